// The vSphere API on directories of this machine, as a vCenter or as a single host: govmomi's simulator without its
// inventory of examples. What it is told to do beyond that, slowness and copies that run in the background, are what real
// servers do and the simulator does not.
package main

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"log"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/simulator/esx"
	"github.com/vmware/govmomi/vim25/types"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string         { return strings.Join(*l, " ") }
func (l *list) Set(value string) error { *l = append(*l, value); return nil }

func main() {
	log.SetFlags(0)
	log.SetPrefix("vcsim: ")
	var datastores, delays list
	kind := flag.String("kind", "vcenter", "what it is: `vcenter or host`")
	listen := flag.String("listen", "127.0.0.1:0", "`address:port`; port 0 takes a free one")
	login := flag.String("login", "user:password", "the only `user:password` that it lets in")
	credentials := flag.String("credentials", "", "`file` with that, in one line: arguments are seen by everybody")
	certificate := flag.String("certificate", "", "`file` with its certificate, and the key; without, one that is in the code")
	copySeconds := flag.Float64("copy-seconds", 0, "copies of disks run in the background and take so many `seconds`")
	datacenters := flag.Int("datacenters", 1, "how many a vCenter has, each with all datastores")
	folders := flag.Int("folders", 0, "1 puts all of a vCenter's inventory into folders")
	flag.Var(&datastores, "datastore", "`name=directory` or name=directory,type=VMFS or NFS; may be repeated")
	flag.Var(&delays, "delay", "`method=milliseconds` that this call takes longer; may be repeated")
	flag.Parse()
	if flag.NArg() != 0 || len(datastores) == 0 || (*kind != "vcenter" && *kind != "host") {
		flag.Usage()
		os.Exit(2)
	}

	model := simulator.VPX()
	model.Datacenter, model.Folder = *datacenters, *folders
	if *kind == "host" {
		model = simulator.ESX()
		// Its template has one that is not there.
		esx.Datacenter.Datastore = nil
	}
	model.Machine, model.Datastore = 0, 0
	model.DelayConfig.MethodDelay = milliseconds(delays)
	check(model.Create())
	manageDisks(*copySeconds)
	manageNamespaces()
	tellSnapshots()

	if *credentials != "" {
		text, err := os.ReadFile(*credentials)
		check(err)
		*login = strings.TrimSuffix(string(text), "\n")
	}
	user, password, _ := strings.Cut(*login, ":")
	model.Service.TLS = identity(*certificate)
	model.Service.Listen = &url.URL{Scheme: "https", Host: *listen, User: url.UserPassword(user, password)}
	server := model.Service.NewServer()
	check(addDatastores(server.URL, datastores))
	countRequests(server)
	fmt.Printf("https://%s/sdk\n", server.URL.Host)

	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	<-ended
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func identity(file string) *tls.Config {
	if file == "" {
		return new(tls.Config)
	}
	pair, err := tls.LoadX509KeyPair(file, file)
	check(err)
	return &tls.Config{Certificates: []tls.Certificate{pair}}
}

func milliseconds(delays list) map[string]int {
	found := map[string]int{}
	for _, delay := range delays {
		method, text, _ := strings.Cut(delay, "=")
		number, err := strconv.Atoi(text)
		check(err)
		found[method] = number
	}
	return found
}

// addDatastores mounts every directory on every host, through the API.
func addDatastores(address *url.URL, datastores list) error {
	ctx := context.Background()
	client, err := govmomi.NewClient(ctx, address, true)
	if err != nil {
		return err
	}
	defer client.Logout(ctx)
	hosts, err := find.NewFinder(client.Client).HostSystemList(ctx, "/...")
	if err != nil {
		return err
	}
	for _, datastore := range datastores {
		name, place, _ := strings.Cut(datastore, "=")
		directory, kind, _ := strings.Cut(place, ",type=")
		directory, err := filepath.Abs(directory)
		if err != nil {
			return err
		}
		for _, host := range hosts {
			if err := addDatastore(ctx, host, name, directory, kind); err != nil {
				return fmt.Errorf("datastore %s: %w", name, err)
			}
		}
	}
	return nil
}

func addDatastore(ctx context.Context, host *object.HostSystem, name, directory, kind string) error {
	system, err := host.ConfigManager().DatastoreSystem(ctx)
	if err != nil {
		return err
	}
	if kind == "" {
		_, err = system.CreateLocalDatastore(ctx, name, directory)
		return err
	}
	_, err = system.CreateNasDatastore(ctx, types.HostNasVolumeSpec{
		RemoteHost: "127.0.0.1", RemotePath: directory, LocalPath: directory, AccessMode: "readWrite", Type: kind,
	})
	return err
}
