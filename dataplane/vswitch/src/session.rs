// SPDX-License-Identifier: Apache-2.0

//! One VMM on one port's socket: the vhost-user protocol.
//!
//! ```text
//!   accepted ──► features, protocol features ──► memory, rings (size, base, addresses, files) ──► rings enabled
//!                       ▲                                                                              │
//!                       └───────────────── GET_VRING_BASE for each ring (the guest resets) ────────────┘
//!   any ──► the socket is closed: all rings are stopped, the memory is unmapped
//! ```
//!
//! Each connection has a thread of its own, which does all that may take time (reading the socket, mapping memory) and
//! hands only the results to the data thread. A VMM that stops in the middle of a message thus holds up nobody.
//!
//! A request that makes no sense is refused, and the connection goes on, as long as it is clear where the next request
//! begins. Nothing is remembered of a VMM that has gone: the next one says all of it again, and its rings say where to
//! go on.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::memory::{DirtyLog, GuestMemory, MAX_REGIONS};
use vring::ring::Addresses;
use vring::vmm::{Head, event_file, handle, refused, region, unsupported};

use crate::poll::Handle;
use crate::port::{LOG_ALL, PROTOCOL_FEATURES};
use crate::switch::{SetupError, Switch};

/// What is offered to guests. (To announce themselves after a migration is up to them and their VMM; it is offered
/// because QEMU complains otherwise.)
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ANY_LAYOUT
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | LOG_ALL
    | PROTOCOL_FEATURES;

struct Session {
    name: String,
    slot: u32,
    pairs: u16,
    switch: Handle,
    memory: GuestMemory,
    features: u64,
}

impl Session {
    fn ask<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Switch) -> std::result::Result<R, SetupError> + Send + 'static,
    ) -> Result<R> {
        let result = self.switch.run(task).map_err(refused)?;
        result.map_err(refused)
    }

    fn use_memory(&mut self, memory: GuestMemory) -> Result<()> {
        tracing::debug!(port = self.name, ?memory, "memory");
        let slot = self.slot;
        let shared = Arc::new(memory.clone());
        // What is not needed any more is unmapped by this thread, not by the one that gave it back.
        let before = self.ask(move |switch| switch.set_memory(slot, shared))?;
        self.memory = memory;
        drop(before);
        Ok(())
    }

    fn index(&self, index: u32) -> Result<u32> {
        if index < u32::from(2 * self.pairs) { Ok(index) } else { Err(refused(SetupError::NoQueue(index))) }
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
        let slot = self.slot;
        self.ask(move |switch| switch.reset(slot))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::FeatureMismatch);
        }
        tracing::debug!(port = self.name, features = format_args!("{features:#x}"), "features");
        self.features = features;
        let slot = self.slot;
        self.ask(move |switch| switch.set_features(slot, features))
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
        self.use_memory(memory)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        self.ask(move |switch| switch.set_size(slot, index, size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = Addresses { descriptors, available, used, used_log };
        self.ask(move |switch| switch.set_addresses(slot, index, addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        self.ask(move |switch| switch.set_base(slot, index, base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // A VMM that asked for a ring that there is not would wait for an answer: the connection is given up.
        let (slot, index) = (self.slot, self.index(index).map_err(|_| Error::BackendInternalError)?);
        let base = self.ask(move |switch| switch.stop(slot, index)).map_err(|_| Error::BackendInternalError)?;
        tracing::debug!(port = self.name, queue = index, base, "queue stopped");
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        tracing::debug!(port = self.name, queue = index, kick = file.is_some(), "queue started");
        self.ask(move |switch| switch.set_kick(slot, index, file))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        self.ask(move |switch| switch.set_call(slot, index, file))
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        self.ask(move |switch| switch.set_error(slot, index, file))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.pairs))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        tracing::debug!(port = self.name, queue = index, enable, "queue enabled or disabled");
        self.ask(move |switch| switch.enable(slot, index, enable))
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
        self.use_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, announced: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(&region(announced)).map_err(refused)?;
        self.use_memory(memory)
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unsupported("the VMM has the device's configuration")
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported("the VMM has the device's configuration")
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("not a GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("no shared objects")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("no buffer is ever in flight")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("no buffer is ever in flight")
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

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        // A VMM that is not answered here would wait: the connection is given up.
        let log = DirtyLog::new(&file, log.mmap_offset, log.mmap_size).map_err(|error| {
            tracing::warn!(port = self.name, %error, "no log of dirty pages");
            Error::BackendInternalError
        })?;
        tracing::debug!(port = self.name, ?log, "log of dirty pages");
        let (slot, log) = (self.slot, Arc::new(log));
        let before = self.ask(move |switch| switch.set_log(slot, log)).map_err(|_| Error::BackendInternalError)?;
        drop(before);
        Ok(())
    }
}

/// Take requests to enable a ring from the socket that come before the features.
fn enable_early(stream: &mut UnixStream, session: &Mutex<Session>, name: &str) -> io::Result<()> {
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    let before_features = || lock().features & PROTOCOL_FEATURES == 0;
    while before_features()
        && let Some(head) = Head::peek(stream)?
        && head.is_enable()
    {
        head.enable(stream, name, |index, enable| lock().set_vring_enable(index, enable))?;
    }
    Ok(())
}

/// Serve a VMM until it goes.
pub fn serve(mut stream: UnixStream, switch: &Handle, slot: u32, name: &str, pairs: u16) {
    tracing::info!(port = name, "connected");
    if switch.run(move |switch| switch.connect(slot, true)).is_err() {
        return;
    }
    let (switch_, memory) = (switch.clone(), GuestMemory::default());
    let session = Session { name: name.to_owned(), slot, pairs, switch: switch_, memory, features: 0 };
    let session = Arc::new(Mutex::new(session));
    if let Ok(theirs) = stream.try_clone() {
        let mut handler = BackendReqHandler::from_stream(theirs, session.clone());
        while enable_early(&mut stream, &session, name).is_ok() && handle(&mut handler, name) {}
    }
    tracing::info!(port = name, "disconnected");
    // What is given back is unmapped here.
    let before = switch.run(move |switch| switch.connect(slot, false));
    drop(before);
}
