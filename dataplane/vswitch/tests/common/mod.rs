// SPDX-License-Identifier: Apache-2.0

//! A daemon under test, and guests that drive it: a small virtio-net driver behind a vhost-user frontend.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::fs::File;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Nothing here takes nearly as long, unless it never happens.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub const CSUM: u64 = 1 << 0;
pub const GUEST_CSUM: u64 = 1 << 1;
pub const GUEST_TSO4: u64 = 1 << 7;
pub const HOST_TSO4: u64 = 1 << 11;
pub const MRG_RXBUF: u64 = 1 << 15;
pub const LOG_ALL: u64 = 1 << 26;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const PROTOCOL_FEATURES: u64 = 1 << 30;
pub const VERSION_1: u64 = 1 << 32;
/// What a modern guest asks for.
pub const MODERN: u64 = VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT_DESC | PROTOCOL_FEATURES;

/// Wait until `ready` gives something.
pub fn eventually<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(result) = ready() {
            return result;
        }
        assert!(Instant::now() < end, "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The daemon, with its control socket held by us as by the agent.
pub struct Daemon {
    folder: tempfile::TempDir,
    control: UnixListener,
    child: Child,
    connection: BufReader<UnixStream>,
}

fn spawn(control: &UnixListener) -> Child {
    let number = control.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator-vswitch"));
    command.args(["--control-fd", &number.to_string(), "--log-level", "warn"]).stdin(Stdio::null());
    // SAFETY: fcntl is async-signal-safe, and changes only the child's descriptor.
    unsafe {
        command.pre_exec(move || match libc::fcntl(number, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    command.spawn().expect("the daemon starts")
}

impl Daemon {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let control = UnixListener::bind(&path).unwrap();
        let child = spawn(&control);
        let connection = BufReader::new(UnixStream::connect(&path).unwrap());
        Daemon { folder, control, child, connection }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// End it as a crash would, and start it again.
    pub fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = spawn(&self.control);
        self.connect();
    }

    pub fn connect(&mut self) {
        self.connection = BufReader::new(UnixStream::connect(self.path("control")).unwrap());
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Give it a signal and wait for its end.
    pub fn terminate(&mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.wait().unwrap().code()
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.connection.get_mut().write_all(bytes).unwrap();
    }

    pub fn send_with_files(&mut self, bytes: &[u8], files: &[RawFd]) {
        let parts = [IoSlice::new(bytes)];
        let control = [ControlMessage::ScmRights(files)];
        let socket = self.connection.get_ref().as_raw_fd();
        assert_eq!(sendmsg::<()>(socket, &parts, &control, MsgFlags::empty(), None).unwrap(), bytes.len());
    }

    pub fn answer(&mut self) -> Value {
        let mut line = String::new();
        self.connection.read_line(&mut line).unwrap();
        serde_json::from_str(&line).expect("an answer")
    }

    pub fn ask(&mut self, request: &Value) -> Value {
        self.send(format!("{request}\n").as_bytes());
        self.answer()
    }

    pub fn apply(&mut self, ports: &[Value]) {
        let answer = self.ask(&json!({"op": "apply", "ports": ports}));
        assert_eq!(answer, json!({"ok": true}));
    }

    /// A port with the addresses that go with its number.
    pub fn port(&self, number: u8) -> Value {
        json!({
            "name": format!("p{number}"),
            "socket": self.path(&format!("{number}.sock")),
            "tap": null,
            "net": 7,
            "mac": format!("02:00:00:00:00:{number:02x}"),
            "ipv4": format!("10.0.0.{number}"),
            "ipv6": format!("fd10::{number:x}"),
            "link_local": format!("fe80::{number:x}"),
        })
    }

    pub fn stats(&mut self, number: u8) -> Value {
        self.ask(&json!({"op": "stats"}))["ports"][format!("p{number}")].clone()
    }

    pub fn stat(&mut self, number: u8, name: &str) -> u64 {
        self.stats(number)[name].as_u64().unwrap_or_else(|| panic!("no {name}"))
    }

    /// Wait until the counter `name` of a port is `value`.
    pub fn wait_for(&mut self, number: u8, name: &str, value: u64) {
        eventually(&format!("{name} = {value} of port {number}"), || {
            let now = self.stat(number, name);
            assert!(now <= value, "{name} of port {number} is {now}");
            (now == value).then_some(())
        });
    }

    pub fn wait_for_failure(&mut self, number: u8) -> String {
        eventually(&format!("the failure of port {number}"), || {
            self.stats(number)["failed"].as_str().map(str::to_owned)
        })
    }
}

/// `port` with another value.
pub fn with(port: &Value, key: &str, value: impl Into<Value>) -> Value {
    let mut port = port.clone();
    port[key] = value.into();
    port
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub const MEMORY: u64 = 4 << 20;
/// Bytes of a receive buffer.
pub const BUFFER: u32 = 2048;
const RING: u64 = 0x4000;
const BUFFERS: u64 = 0x10_0000;

/// The driver's side of one queue.
pub struct Driver {
    pub size: u16,
    pub base: u64,
    pub avail: u16,
    pub used: u16,
    pub kick: EventFd,
    pub call: EventFd,
    pub buffer: u32,
}

impl Driver {
    fn new(index: usize, size: u16) -> Self {
        Driver {
            size,
            base: 0x8000 + index as u64 * RING,
            avail: 0,
            used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            buffer: BUFFER,
        }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x2800
    }

    fn buffer(&self, index: usize, entry: u16) -> u64 {
        BUFFERS + (index as u64 * 64 + u64::from(entry)) * 0x2000
    }
}

/// A guest and its VMM.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    pub file: File,
    pub features: u64,
    pub queues: Vec<Driver>,
    pub frontend: Option<Frontend>,
}

impl Guest {
    pub fn new(features: u64) -> Self {
        Guest::with_pairs(features, 1, 16)
    }

    pub fn with_pairs(features: u64, pairs: usize, size: u16) -> Self {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY as usize, Some(offset))]).unwrap();
        let queues = (0..2 * pairs).map(|index| Driver::new(index, size)).collect();
        Guest { memory, file, features, queues, frontend: None }
    }

    /// A guest with [`MODERN`] features that is connected to `daemon` and has buffers to receive.
    pub fn connected(daemon: &Daemon, number: u8) -> Self {
        let mut guest = Guest::new(MODERN);
        guest.connect(&daemon.path(&format!("{number}.sock")));
        guest.fill();
        guest
    }

    pub fn header(&self) -> usize {
        if self.features & (VERSION_1 | MRG_RXBUF) != 0 { 12 } else { 10 }
    }

    fn host_address(&self) -> u64 {
        self.memory.get_host_address(GuestAddress(0)).unwrap() as u64
    }

    pub fn region(&self, guest: u64, size: u64) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: size,
            userspace_addr: self.host_address() + guest,
            mmap_offset: guest,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().expect("connected")
    }

    /// Connect as a VMM does, up to the memory.
    pub fn greet(&mut self, socket: &Path) {
        self.greet_on(Frontend::connect(socket, self.queues.len() as u64).unwrap());
    }

    pub fn greet_on(&mut self, mut frontend: Frontend) {
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(self.features & !offered, 0);
        if self.features & PROTOCOL_FEATURES != 0 {
            let protocol = frontend.get_protocol_features().unwrap();
            let wanted = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::LOG_SHMFD
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
            assert!(protocol.contains(wanted));
            frontend.set_protocol_features(wanted).unwrap();
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(self.features).unwrap();
        self.frontend = Some(frontend);
        let whole = self.region(0, MEMORY);
        self.frontend().set_mem_table(&[whole]).unwrap();
    }

    /// Connect as a VMM does, and start all rings.
    pub fn connect(&mut self, socket: &Path) {
        self.greet(socket);
        for index in 0..self.queues.len() {
            self.start(index);
        }
    }

    pub fn start(&mut self, index: usize) {
        self.start_without_enabling(index);
        if self.features & PROTOCOL_FEATURES != 0 {
            self.frontend().set_vring_enable(index, true).unwrap();
        }
    }

    fn config(&self, index: usize) -> VringConfigData {
        let host = self.host_address();
        let queue = &self.queues[index];
        VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: host + queue.descriptors(),
            used_ring_addr: host + queue.used_ring(),
            avail_ring_addr: host + queue.available(),
            log_addr: None,
        }
    }

    /// What a VMM says of running rings when the guest begins to migrate.
    pub fn log_used_rings(&mut self) {
        for index in 0..self.queues.len() {
            let log_addr = Some(self.queues[index].used_ring());
            let config = VringConfigData { flags: 1, log_addr, ..self.config(index) };
            self.frontend().set_vring_addr(index, &config).unwrap();
        }
    }

    /// Where the next frame is going to be.
    pub fn next_buffer(&self, index: usize) -> u64 {
        let queue = &self.queues[index];
        queue.buffer(index, queue.used % queue.size)
    }

    pub fn start_without_enabling(&mut self, index: usize) {
        let config = self.config(index);
        let queue = &self.queues[index];
        let frontend = self.frontend.as_mut().expect("connected");
        frontend.set_vring_num(index, queue.size).unwrap();
        frontend.set_vring_base(index, queue.used).unwrap();
        frontend.set_vring_addr(index, &config).unwrap();
        frontend.set_vring_call(index, &queue.call).unwrap();
        frontend.set_vring_kick(index, &queue.kick).unwrap();
    }

    /// Stop a ring; gives where the device would go on.
    pub fn stop(&mut self, index: usize) -> u16 {
        self.frontend().get_vring_base(index).unwrap() as u16
    }

    /// What QEMU does when the connection is gone: the rings go on where the device has used them up to.
    pub fn disconnect(&mut self) {
        self.frontend = None;
        for index in 0..self.queues.len() {
            let used: u16 = self.memory.read_obj(GuestAddress(self.queues[index].used_ring() + 2)).unwrap();
            assert!(self.queues[index].avail.wrapping_sub(used) <= self.queues[index].size);
        }
    }

    pub fn write<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn read<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.memory.read_obj(GuestAddress(address)).unwrap()
    }

    pub fn put(&self, index: usize, entry: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.put_in(self.queues[index].descriptors(), entry, address, length, flags, next);
    }

    pub fn put_in(&self, table: u64, entry: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = table + u64::from(entry) * 16;
        self.write(at, address);
        self.write(at + 8, length);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Make the chain that begins with `head` available.
    pub fn offer(&mut self, index: usize, head: u16) {
        let queue = &mut self.queues[index];
        let entry = u64::from(queue.avail % queue.size);
        let (ring, next) = (queue.available(), queue.avail.wrapping_add(1));
        queue.avail = next;
        self.write(ring + 4 + entry * 2, head);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.write(ring + 2, next);
    }

    pub fn kick(&self, index: usize) {
        self.queues[index].kick.write(1).unwrap();
    }

    /// Offer as many receive buffers as there is room for.
    pub fn fill(&mut self) {
        for index in (0..self.queues.len()).step_by(2) {
            self.offer_buffers(index, self.queues[index].size);
        }
    }

    pub fn offer_buffers(&mut self, index: usize, count: u16) {
        for _ in 0..count {
            let queue = &self.queues[index];
            let entry = queue.avail % queue.size;
            let (address, length) = (queue.buffer(index, entry), queue.buffer);
            self.put(index, entry, address, length, 2, 0);
            self.offer(index, entry);
        }
        self.kick(index);
    }

    /// Send a frame in one buffer.
    pub fn send(&mut self, frame: &[u8]) {
        self.send_with(1, &[0; 12], frame, &[]);
    }

    /// Send a frame with a header, cut into buffers at `cuts`.
    pub fn send_with(&mut self, index: usize, header: &[u8; 12], frame: &[u8], cuts: &[usize]) {
        let bytes = [&header[..self.header()], frame].concat();
        let entry = self.queues[index].avail % self.queues[index].size;
        let address = self.queues[index].buffer(index, entry);
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        let mut ends: Vec<usize> = cuts.iter().copied().filter(|cut| *cut < bytes.len()).collect();
        ends.push(bytes.len());
        let mut start = 0;
        let table = address + 0x1f00;
        for (number, end) in ends.iter().enumerate() {
            let last = number + 1 == ends.len();
            let part = (address + start as u64, (end - start) as u32);
            let flags = u16::from(!last);
            if ends.len() == 1 {
                self.put(index, entry, part.0, part.1, 0, 0);
            } else {
                self.put_in(table, number as u16, part.0, part.1, flags, number as u16 + 1);
            }
            start = *end;
        }
        if ends.len() > 1 {
            self.put(index, entry, table, ends.len() as u32 * 16, 4, 0);
        }
        self.offer(index, entry);
        self.kick(index);
    }

    /// Send a large frame, in buffers of its own far from the others.
    pub fn send_large(&mut self, header: &[u8; 12], frame: &[u8]) {
        let address = MEMORY - 0x2_0000;
        self.memory.write_slice(&[&header[..], frame].concat(), GuestAddress(address)).unwrap();
        let entry = self.queues[1].avail % self.queues[1].size;
        self.put(1, entry, address, frame.len() as u32 + 12, 0, 0);
        self.offer(1, entry);
        self.kick(1);
    }

    fn has_used(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        let used: u16 = self.read(queue.used_ring() + 2);
        used != queue.used
    }

    /// Wait for a used buffer as a driver does, by the interrupt: (head, bytes written).
    pub fn wait_used(&mut self, index: usize) -> (u16, u32) {
        let end = Instant::now() + PATIENCE;
        loop {
            if self.has_used(index) {
                let queue = &mut self.queues[index];
                let at = queue.used_ring() + 4 + u64::from(queue.used % queue.size) * 8;
                queue.used = queue.used.wrapping_add(1);
                let (event, used) = (queue.available() + 4 + u64::from(queue.size) * 2, queue.used);
                self.write(event, used);
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                return (self.read::<u32>(at) as u16, self.read(at + 4));
            }
            assert!(Instant::now() < end, "no buffer of queue {index} is used");
            let mut files = [PollFd::new(borrow(&self.queues[index].call), PollFlags::POLLIN)];
            let count = poll(&mut files, PollTimeout::from(2000_u16)).unwrap();
            assert!(count > 0 || self.has_used(index), "no interrupt of queue {index}");
            let _ = self.queues[index].call.read();
        }
    }

    /// Wait for a frame: its `virtio_net_hdr` and its bytes. The buffers are offered again.
    pub fn receive(&mut self) -> (Vec<u8>, Vec<u8>) {
        self.receive_in(0)
    }

    pub fn receive_in(&mut self, index: usize) -> (Vec<u8>, Vec<u8>) {
        let mut bytes = self.take(index);
        let header = self.header();
        let count = if header == 12 { u16::from_le_bytes([bytes[10], bytes[11]]) } else { 1 };
        for _ in 1..count {
            let more = self.take(index);
            bytes.extend(more);
        }
        self.offer_buffers(index, count);
        let frame = bytes.split_off(header);
        (bytes, frame)
    }

    fn take(&mut self, index: usize) -> Vec<u8> {
        let (head, length) = self.wait_used(index);
        let mut bytes = vec![0; length as usize];
        let address = self.read::<u64>(self.queues[index].descriptors() + u64::from(head) * 16);
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub fn has_received(&self) -> bool {
        self.has_used(0)
    }
}

/// An IPv4 frame with a UDP datagram from one port's addresses to another's, filled up to `length` with `mark`.
pub fn frame(from: u8, to: u8, length: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![mark; length];
    frame[..6].copy_from_slice(&[2, 0xff, 0xff, 0xff, 0xff, 0xff]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, from]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14..34].fill(0);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[22] = 64;
    frame[23] = 17;
    frame[26..30].copy_from_slice(&[10, 0, 0, from]);
    frame[30..34].copy_from_slice(&[10, 0, 0, to]);
    frame
}

/// The same with IPv6.
pub fn frame6(from: u8, to: u8, length: usize, next: u8, mark: u8) -> Vec<u8> {
    let mut frame = frame(from, to, length, mark);
    frame[12..14].copy_from_slice(&[0x86, 0xdd]);
    frame[14..54].fill(0);
    frame[14] = 0x60;
    frame[18..20].copy_from_slice(&((length - 54) as u16).to_be_bytes());
    frame[20] = next;
    frame[21] = 64;
    for (at, number) in [(22, from), (38, to)] {
        frame[at..at + 2].copy_from_slice(&[0xfd, 0x10]);
        frame[at + 15] = number;
    }
    frame
}

/// What arrives of `frame` at the port `to`.
pub fn delivered(frame: &[u8], to: u8) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, to]);
    frame
}

fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event has the descriptor open as long as it lives.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Another descriptor of an event.
pub fn share(event: &EventFd) -> OwnedFd {
    borrow(event).try_clone_to_owned().unwrap()
}
