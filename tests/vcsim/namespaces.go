package main

import (
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// namespaceManager makes the top directories of a VSAN datastore, as only it can do on a real one.
type namespaceManager struct {
	mo.DatastoreNamespaceManager
}

func manageNamespaces() {
	if ref := simulator.Map.Get(types.ManagedObjectReference{Type: "ServiceInstance", Value: "ServiceInstance"}).(*simulator.ServiceInstance).Content.DatastoreNamespaceManager; ref != nil {
		manager := &namespaceManager{}
		manager.Self = *ref
		simulator.Map.Put(manager)
	}
}

// CreateDirectory makes one; without a name it would choose one itself.
func (m *namespaceManager) CreateDirectory(req *types.CreateDirectory) soap.HasFault {
	body := new(methods.CreateDirectoryBody)
	datastore, ok := simulator.Map.Get(req.Datastore).(*simulator.Datastore)
	if !ok || !strings.EqualFold(datastore.Summary.Type, "vsan") || strings.Contains(req.DisplayName, "/") {
		body.Fault_ = simulator.Fault("", &types.CannotCreateFile{FileFault: types.FileFault{File: req.DisplayName}})
		return body
	}
	datacenter := datastoreDatacenter(datastore)
	made := simulator.Map.FileManager().MakeDirectory(&types.MakeDirectory{
		Name: "[" + datastore.Name + "] " + req.DisplayName, Datacenter: &datacenter,
	}).(*methods.MakeDirectoryBody)
	if made.Fault_ != nil {
		body.Fault_ = made.Fault_
		return body
	}
	body.Res = &types.CreateDirectoryResponse{Returnval: datastore.Info.GetDatastoreInfo().Url + "/" + req.DisplayName}
	return body
}

// datastoreDatacenter walks up from a datastore.
func datastoreDatacenter(datastore *simulator.Datastore) types.ManagedObjectReference {
	ref := *datastore.Parent
	for ref.Type != "Datacenter" {
		switch parent := simulator.Map.Get(ref).(type) {
		case *simulator.Folder:
			ref = *parent.Parent
		default:
			return ref
		}
	}
	return ref
}
