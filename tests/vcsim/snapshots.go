package main

import (
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// snapshotRoots sets what a VM tells of its snapshots beside their tree: references, as property collectors follow them.
type snapshotRoots struct {
	self types.ManagedObjectReference
}

func tellSnapshots() {
	simulator.Map.AddHandler(&snapshotRoots{types.ManagedObjectReference{Type: "Handler", Value: "snapshots"}})
}

func (s *snapshotRoots) Reference() types.ManagedObjectReference { return s.self }

func (s *snapshotRoots) PutObject(mo.Reference) {}

func (s *snapshotRoots) RemoveObject(types.ManagedObjectReference) {}

func (s *snapshotRoots) UpdateObject(thing mo.Reference, changes []types.PropertyChange) {
	vm, ok := thing.(*mo.VirtualMachine)
	if !ok {
		return
	}
	vm.RootSnapshot = nil
	if vm.Snapshot != nil {
		for _, tree := range vm.Snapshot.RootSnapshotList {
			vm.RootSnapshot = append(vm.RootSnapshot, tree.Snapshot)
		}
	}
}
