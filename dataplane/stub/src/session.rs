// SPDX-License-Identifier: Apache-2.0

//! One VMM on one device's socket: the vhost-user protocol.
//!
//! ```text
//!   accepted ──► features ──► configuration ──► memory, requests in flight, rings (size, base, addresses, files)
//!                   ▲                                               │ kick, enabled
//!                   │                                               ▼
//!                   └──── GET_VRING_BASE: drained and stopped ◄── running
//!   any ──► the socket is closed: all rings are stopped at once; what has no answer is kept in flight
//! ```
//!
//! # What the `vhost` crate does not do
//!
//! It insists on features before rings are enabled ([`vring::vmm`]), and does not hand out the socket that the VMM is told
//! of changes by. So these two requests are taken from the VMM's socket here.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::inflight::Inflight;
use vring::memory::{GuestMemory, MAX_REGIONS};
use vring::ring::{Addresses, Features};
use vring::vmm::{HEADER, Head, VERSION, event_file, handle, refused, region, unsupported};
use wire::{Attached, SessionId};

use crate::queue::{Command, Handle, Start};
use crate::remote::{Remote, fresh_session, lock};

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
const PROTOCOL_FEATURES: u64 = 1 << 30;
/// What the transport offers, whatever the device is.
const TRANSPORT: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | PROTOCOL_FEATURES;
/// For the server to tell what the device is, when a VMM asks for the first time.
const PATIENCE: Duration = Duration::from_secs(15);

const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE: u32 = 2;

#[derive(Default)]
struct QueueState {
    size: u32,
    base: u16,
    addresses: Option<Addresses>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    running: bool,
}

struct Session {
    name: String,
    remote: Arc<Remote>,
    workers: Vec<Handle>,
    queues: Vec<QueueState>,
    memory: GuestMemory,
    features: u64,
    inflight: Option<Arc<Inflight>>,
    session: SessionId,
    /// The configuration that the VMM has asked for last.
    told: Vec<u8>,
}

impl Session {
    fn known(&self) -> Result<Attached> {
        let none = || Error::ReqHandlerError(io::Error::new(io::ErrorKind::TimedOut, "the server does not answer"));
        self.remote.wait_until_known(PATIENCE).ok_or_else(none)
    }

    fn queue(&mut self, index: u32) -> Result<&mut QueueState> {
        let none = || Error::ReqHandlerError(io::Error::other(format!("there is no queue {index}")));
        self.queues.get_mut(index as usize).ok_or_else(none)
    }

    /// Begin with a ring if all of it is known.
    fn start_if_complete(&mut self, index: u32) -> Result<()> {
        let enabled_by_kick = self.features & PROTOCOL_FEATURES == 0;
        let features = Features {
            event_idx: self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            indirect: self.features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0,
        };
        let (memory, inflight, session) = (self.memory.clone(), self.inflight.clone(), self.session);
        let queue = self.queue(index)?;
        let (Some(addresses), true) = (queue.addresses, !queue.running && (queue.enabled || enabled_by_kick)) else {
            return Ok(());
        };
        let Some(kick) = queue.kick.take() else { return Ok(()) };
        queue.running = true;
        let start = Start {
            memory: Arc::new(memory),
            addresses,
            size: queue.size,
            base: queue.base,
            features,
            kick,
            call: queue.call.take(),
            inflight,
            session,
        };
        self.remote.use_session(session);
        self.workers[index as usize].tell(Command::Start(Box::new(start)));
        // QEMU forgets what it is told of a device that no driver uses yet.
        if self.known()?.config != self.told {
            self.remote.tell_config();
        }
        Ok(())
    }

    fn stop(&mut self, index: u32) -> Result<u16> {
        let worker = self.workers.get(index as usize).cloned();
        let queue = self.queue(index)?;
        let was_running = std::mem::take(&mut queue.running);
        queue.kick = None;
        if let (true, Some(worker)) = (was_running, worker) {
            queue.base = worker.stop();
        }
        Ok(queue.base)
    }

    fn use_memory(&mut self, memory: GuestMemory) {
        self.memory = memory;
        let shared = Arc::new(self.memory.clone());
        for (queue, worker) in self.queues.iter().zip(&self.workers) {
            if queue.running {
                worker.tell(Command::Memory(Arc::clone(&shared)));
            }
        }
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.queues.len() as u32 {
            self.stop(index)?;
            *self.queue(index)? = QueueState::default();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(TRANSPORT | self.known()?.features)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !(TRANSPORT | self.known()?.features) != 0 {
            return Err(Error::FeatureMismatch);
        }
        tracing::debug!(device = self.name, features = format_args!("{features:#x}"), "features");
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut memory = GuestMemory::default();
        for (announced, file) in regions.iter().zip(&files) {
            memory = memory.with(region(announced), file).map_err(refused)?;
        }
        self.use_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        self.queue(index)?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.queue(index)?.addresses = Some(Addresses { descriptors, available, used, used_log: None });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.queue(index)?.base = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // A VMM that asked for a ring that there is not would wait for an answer: the connection is given up.
        let base = self.stop(index).map_err(|_| Error::BackendInternalError)?;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.queue(index.into())?.kick = event_file(file)?;
        self.start_if_complete(index.into())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = event_file(file)?;
        let queue = self.queue(index.into())?;
        if queue.running {
            self.workers[usize::from(index)].tell(Command::Call(call));
        } else {
            queue.call = call;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _file: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.known()?.queues).min(self.queues.len() as u64))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queue(index)?.enabled = enable;
        if enable { self.start_if_complete(index) } else { Ok(()) }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        announced: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let memory = self.memory.with(region(announced), &file).map_err(refused)?;
        self.use_memory(memory);
        Ok(None)
    }

    fn remove_mem_region(&mut self, announced: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(&region(announced)).map_err(refused)?;
        self.use_memory(memory);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = self.known()?.config;
        self.told.clone_from(&config);
        let part = config.get(offset as usize..).unwrap_or_default();
        let mut bytes = part[..part.len().min(size as usize)].to_vec();
        bytes.resize(size as usize, 0);
        Ok(bytes)
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported("the configuration cannot be written")
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("not a GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("no shared objects")
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let session = fresh_session();
        let made = Inflight::create(wanted.num_queues, wanted.queue_size, &session.0).map_err(refused)?;
        let (inflight, file) = made;
        let told = VhostUserInflight {
            mmap_size: inflight.bytes(),
            mmap_offset: 0,
            num_queues: wanted.num_queues,
            queue_size: wanted.queue_size,
        };
        (self.inflight, self.session) = (Some(Arc::new(inflight)), session);
        Ok((told, file))
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *told;
        let inflight = Inflight::map(&file, mmap_offset, mmap_size, num_queues, queue_size).map_err(refused)?;
        self.session = SessionId(inflight.label());
        self.inflight = Some(Arc::new(inflight));
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported("the device has no state")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("the device has no state")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("no shared memory")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported("no log of dirty pages")
    }
}

// -- requests that are taken from the socket here ------------------------------------------------------------------------

/// Take those requests that are next and that the `vhost` crate is not to see.
fn take_early(stream: &mut UnixStream, session: &Mutex<Session>, name: &str) -> io::Result<()> {
    while let Some(head) = Head::peek(stream)? {
        if head.is_enable() && lock(session).features & PROTOCOL_FEATURES == 0 {
            head.enable(stream, name, |index, enable| lock(session).set_vring_enable(index, enable))?;
        } else if (head.request, head.size) == (SET_BACKEND_REQ_FD, 0) {
            let told = take_file(stream)?;
            let failed = told.is_none();
            if let Some(told) = told {
                let told = Mutex::new(told);
                lock(session).remote.on_config(Some(Box::new(move || {
                    let message = [CONFIG_CHANGE, VERSION, 0].map(u32::to_ne_bytes).concat();
                    let _ = lock(&told).write_all(&message);
                })));
            }
            head.reply(stream, failed)?;
        } else {
            break;
        }
    }
    Ok(())
}

/// A request's header with the socket that comes along.
fn take_file(stream: &UnixStream) -> io::Result<Option<UnixStream>> {
    let mut head = [0; HEADER];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut parts = [io::IoSliceMut::new(&mut head)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut found = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(files) = control {
            for file in files {
                // SAFETY: the kernel has just made it, for us.
                found = Some(UnixStream::from(unsafe { OwnedFd::from_raw_fd(file) }));
            }
        }
    }
    if let Some(found) = &found {
        found.set_write_timeout(Some(Duration::from_secs(1)))?;
    }
    Ok(found)
}

// -- the connection ------------------------------------------------------------------------------------------------------

/// Serve a VMM until it goes.
pub fn serve(mut stream: UnixStream, name: &str, remote: &Arc<Remote>, workers: &[Handle]) {
    tracing::info!(device = name, "connected");
    let session = Session {
        name: name.to_owned(),
        remote: Arc::clone(remote),
        workers: workers.to_vec(),
        queues: workers.iter().map(|_| QueueState::default()).collect(),
        memory: GuestMemory::default(),
        features: 0,
        inflight: None,
        session: fresh_session(),
        told: Vec::new(),
    };
    let session = Arc::new(Mutex::new(session));
    if let Ok(theirs) = stream.try_clone() {
        let mut handler = BackendReqHandler::from_stream(theirs, session.clone());
        while take_early(&mut stream, &session, name).is_ok() && handle(&mut handler, name) {}
    }
    remote.on_config(None);
    for worker in workers {
        worker.tell(Command::Drop);
    }
    tracing::info!(device = name, "disconnected");
}
