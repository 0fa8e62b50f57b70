package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"io"
	"net/http"
	"strings"
	"sync"

	"github.com/vmware/govmomi/simulator"
)

// counter counts what is asked of the server, and tells it at /requests: calls by method, reads of properties by the
// type of the first object too, file transfers by HTTP method.
type counter struct {
	next http.Handler

	lock   sync.Mutex
	counts map[string]int
}

// countRequests counts from here on; called while nothing is asked.
func countRequests(server *simulator.Server) {
	server.Config.Handler = &counter{next: server.Config.Handler, counts: map[string]int{}}
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/requests":
		c.lock.Lock()
		defer c.lock.Unlock()
		_ = json.NewEncoder(w).Encode(c.counts)
		return
	case strings.HasPrefix(r.URL.Path, "/folder/"):
		c.count(r.Method + " /folder")
	case r.Method == http.MethodPost:
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		c.count(method(body))
	default:
		c.count(r.Method + " " + r.URL.Path)
	}
	c.next.ServeHTTP(w, r)
}

func (c *counter) count(what string) {
	c.lock.Lock()
	defer c.lock.Unlock()
	c.counts[what]++
}

// method is what stands in the body of a call.
func method(envelope []byte) string {
	decoder := xml.NewDecoder(bytes.NewReader(envelope))
	name, inBody := "", false
	for {
		token, err := decoder.Token()
		if err != nil {
			return name
		}
		element, ok := token.(xml.StartElement)
		switch {
		case !ok:
		case !inBody:
			inBody = element.Name.Local == "Body"
		case name == "":
			name = element.Name.Local
			if name != "RetrievePropertiesEx" {
				return name
			}
		case element.Name.Local == "obj":
			for _, each := range element.Attr {
				if each.Name.Local == "type" {
					return name + " " + each.Value
				}
			}
		}
	}
}
