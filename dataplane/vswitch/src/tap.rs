// SPDX-License-Identifier: Apache-2.0

//! A port's own tap: how frames get to the kernel's switch, and back from it.
//!
//! The tap is made by the control plane and only attached here, with a `virtio_net_hdr` of 12 bytes before each frame
//! (kernel: `Documentation/networking/tuntap.rst`). What the guest can take is told to the kernel, which segments and
//! sums up the rest. Neither direction ever waits.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use crate::frame::NET_HEADER;

const DEVICE: &str = "/dev/net/tun";
const NAME_SIZE: usize = 16;

/// The requests, by the kernel's names.
mod request {
    nix::ioctl_write_int!(tunsetiff, b'T', 202);
    nix::ioctl_write_int!(tunsetoffload, b'T', 208);
    nix::ioctl_write_ptr!(tunsetvnethdrsz, b'T', 216, libc::c_int);
}

/// `struct ifreq` as far as `TUNSETIFF` looks at it.
#[repr(C)]
struct Request {
    name: [u8; NAME_SIZE],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// An attached tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Attach to the tap `name`.
    ///
    /// # Errors
    ///
    /// There is none of that name, it is attached elsewhere, or it is not ours to use.
    pub fn attach(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() >= NAME_SIZE || name.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a link"));
        }
        // TUNSETIFF would make one that goes away with us.
        nix::net::if_::if_nametoindex(name)?;
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE)?;
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        let mut interface = Request { name: [0; NAME_SIZE], flags, rest: [0; 22] };
        interface.name[..name.len()].copy_from_slice(name.as_bytes());
        let size = NET_HEADER as libc::c_int;
        // SAFETY: both requests read what the pointers lead to, a whole `struct ifreq` and an int.
        unsafe {
            request::tunsetiff(file.as_raw_fd(), &raw const interface as libc::c_ulong)?;
            request::tunsetvnethdrsz(file.as_raw_fd(), &raw const size)?;
        }
        let tap = Tap { file };
        tap.set_features(0)?;
        Ok(tap)
    }

    /// Tell the kernel what a guest with these features can take.
    ///
    /// # Errors
    ///
    /// The kernel refuses it.
    pub fn set_features(&self, features: u64) -> io::Result<()> {
        let has = |feature: u32| features >> feature & 1 != 0;
        let mut offload = 0;
        if has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= libc::TUN_F_CSUM;
            for (feature, flag) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
                (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
            ] {
                if has(feature) {
                    offload |= flag;
                }
            }
            if offload & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) == 0 {
                offload &= !libc::TUN_F_TSO_ECN;
            }
        }
        // SAFETY: the request takes a number.
        unsafe { request::tunsetoffload(self.file.as_raw_fd(), libc::c_ulong::from(offload)) }?;
        Ok(())
    }

    /// Write one frame, header first.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for what the kernel takes for no frame; anything else for what it has no place for.
    ///
    /// # Safety
    ///
    /// The parts are all readable.
    pub unsafe fn write(&self, parts: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller says that the parts are readable.
        let written = unsafe { libc::writev(self.file.as_raw_fd(), parts.as_ptr(), parts.len() as libc::c_int) };
        if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Read one frame, header first; None if there is none.
    ///
    /// # Errors
    ///
    /// The link is gone.
    pub fn read(&self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match nix::unistd::read(&self.file, frame) {
            Ok(length) => Ok(Some(length)),
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
