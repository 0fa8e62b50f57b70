package main

import (
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

const steps = 20

// diskManager copies as the simulator's does, but after the call, as real servers do: the task runs, tells its progress,
// and can be cancelled.
type diskManager struct {
	simulator.VirtualDiskManager
	step time.Duration
}

type copyTask struct {
	simulator.Task
	cancelled int32
}

func manageDisks(copySeconds float64) {
	if copySeconds == 0 {
		return
	}
	manager := simulator.Map.VirtualDiskManager().(*simulator.VirtualDiskManager)
	step := time.Duration(copySeconds / steps * float64(time.Second))
	simulator.Map.Put(&diskManager{VirtualDiskManager: *manager, step: step})
}

// CopyVirtualDiskTask starts a copy.
func (m *diskManager) CopyVirtualDiskTask(ctx *simulator.Context, req *types.CopyVirtualDisk_Task) soap.HasFault {
	task := &copyTask{Task: *simulator.CreateTask(m, "copyVirtualDisk", nil)}
	simulator.Map.Put(task)
	task.update("info.state", types.TaskInfoStateRunning)
	go m.copy(ctx, req, task)
	return &methods.CopyVirtualDisk_TaskBody{Res: &types.CopyVirtualDisk_TaskResponse{Returnval: task.Self}}
}

func (m *diskManager) copy(ctx *simulator.Context, req *types.CopyVirtualDisk_Task, task *copyTask) {
	for done := 0; done < steps; done++ {
		task.update("info.progress", int32(100*done/steps))
		time.Sleep(m.step)
		if atomic.LoadInt32(&task.cancelled) != 0 {
			task.fail(types.LocalizedMethodFault{Fault: new(types.RequestCanceled), LocalizedMessage: "canceled"})
			return
		}
	}
	body := m.VirtualDiskManager.CopyVirtualDiskTask(ctx, req).(*methods.CopyVirtualDisk_TaskBody)
	info := simulator.Map.Get(body.Res.Returnval).(*simulator.Task).Info
	if info.Error != nil {
		task.fail(*info.Error)
		return
	}
	task.update("info.state", types.TaskInfoStateSuccess)
}

// CancelTask asks a copy to end.
func (t *copyTask) CancelTask(*types.CancelTask) soap.HasFault {
	atomic.StoreInt32(&t.cancelled, 1)
	return &methods.CancelTaskBody{Res: new(types.CancelTaskResponse)}
}

func (t *copyTask) fail(fault types.LocalizedMethodFault) {
	t.update("info.error", fault)
	t.update("info.state", types.TaskInfoStateError)
}

func (t *copyTask) update(name string, value types.AnyType) {
	simulator.Map.WithLock(t, func() {
		simulator.Map.Update(t, []types.PropertyChange{{Name: name, Val: value}})
	})
}
