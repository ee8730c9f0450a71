// SPDX-License-Identifier: Apache-2.0

//! What is wished for and what is there: a socket for each device, its way to the server, and a worker for each queue.
//!
//! A wish is always the whole of it. What is there already stays as it is. One VMM is served per device; another that
//! connects waits until the first has gone.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::{Value, json};
use vring::socket::Socket;

use crate::queue::{self, Command, Handle};
use crate::remote::{Remote, lock};
use crate::session;
use crate::wish::Wish;

struct Device {
    wish: Wish,
    remote: Arc<Remote>,
    workers: Vec<Handle>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    ended: AtomicBool,
    waker: EventFd,
    vmm: Mutex<Option<UnixStream>>,
}

impl Device {
    fn start(wish: Wish, busy_poll: Duration) -> io::Result<Self> {
        let socket = Socket::bind(&wish.socket, wish.socket_mode, wish.socket_owner)?;
        let remote = Remote::start(&wish)?;
        let workers = (0..wish.queues)
            .map(|number| queue::start(&wish.name, number, &remote, busy_poll))
            .collect::<io::Result<Vec<_>>>()?;
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { ended: AtomicBool::new(false), waker, vmm: Mutex::default() });
        let (name, theirs, way, hands) = (wish.name.clone(), Arc::clone(&shared), Arc::clone(&remote), workers.clone());
        let thread = std::thread::Builder::new()
            .name("vmm".to_owned())
            .spawn(move || accept(&socket, &name, &theirs, &way, &hands))?;
        Ok(Device { wish, remote, workers, shared, thread: Some(thread) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        let _ = self.shared.waker.write(1);
        if let Some(vmm) = &*lock(&self.shared.vmm) {
            let _ = vmm.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for worker in &self.workers {
            worker.tell(Command::End);
        }
        self.remote.close();
    }
}

/// Serve one VMM after the other.
fn accept(socket: &Socket, name: &str, shared: &Shared, remote: &Arc<Remote>, workers: &[Handle]) {
    while !shared.ended.load(Ordering::Acquire) {
        let mut files =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(shared.waker.as_fd(), PollFlags::POLLIN)];
        match poll(&mut files, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(device = name, %error, "no VMM can connect any more");
                return;
            }
        }
        match socket.accept() {
            Ok(Some(stream)) => {
                *lock(&shared.vmm) = stream.try_clone().ok();
                if !shared.ended.load(Ordering::Acquire) {
                    session::serve(stream, name, remote, workers);
                }
                *lock(&shared.vmm) = None;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(device = name, %error, "a VMM cannot be served");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// See the module's documentation.
pub struct Daemon {
    devices: Mutex<BTreeMap<String, Device>>,
    busy_poll: Duration,
}

impl Daemon {
    /// One that has nothing yet.
    pub fn new(busy_poll: Duration) -> Self {
        Daemon { devices: Mutex::default(), busy_poll }
    }

    /// Have it be as wished.
    ///
    /// # Errors
    ///
    /// What cannot be had; the rest is there.
    pub fn apply(&self, wishes: Vec<Wish>) -> Result<(), String> {
        Wish::check(&wishes)?;
        let mut devices = lock(&self.devices);
        devices.retain(|_, device| wishes.contains(&device.wish));
        let mut failures = Vec::new();
        for wish in wishes {
            if devices.contains_key(&wish.name) {
                continue;
            }
            let name = wish.name.clone();
            match Device::start(wish, self.busy_poll) {
                Ok(device) => {
                    devices.insert(name, device);
                }
                Err(error) => failures.push(format!("device {name}: {error}")),
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
    }

    /// What there is, and who waits for whom since when.
    pub fn stats(&self) -> Value {
        let devices = lock(&self.devices);
        let all: BTreeMap<_, _> = devices
            .iter()
            .map(|(name, device)| {
                let state = device.remote.state();
                let told = json!({
                    "guest": device.wish.guest,
                    "server": device.wish.server,
                    "module": device.wish.module,
                    "connected": lock(&device.shared.vmm).is_some(),
                    "attached": state.up,
                    "trouble": state.trouble,
                    "since_seconds": state.since.elapsed().as_secs_f64(),
                    "queues": device.workers.iter().map(Handle::stats).collect::<Vec<_>>(),
                });
                (name.clone(), told)
            })
            .collect();
        json!({"devices": all})
    }
}
