// SPDX-License-Identifier: Apache-2.0

//! The socket of a port, on which its VMM connects.
//!
//! It is either bound here or handed over by the parent, which can then connect a VMM before this process is up.
//! A file that is left from an earlier process is replaced; a file that is no socket never is.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt::AcceptConn,
};

/// A listening socket; its file goes with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and number of its file, so that nobody else's is removed.
    file: Option<(u64, u64)>,
}

fn file_of(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Socket {
    /// Bind a socket at `path`.
    ///
    /// # Errors
    ///
    /// There is a file that is no socket, or the kernel refuses one of the steps.
    pub fn bind(path: &Path, mode: u32, owner: Option<(u32, u32)>) -> io::Result<Self> {
        match fs::symlink_metadata(path) {
            Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path)?,
            Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let file = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        bind(file.as_raw_fd(), &UnixAddr::new(path)?)?;
        // Nobody can connect before it listens, so nobody sees it with the wrong mode.
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        if let Some((user, group)) = owner {
            std::os::unix::fs::chown(path, Some(user), Some(group))?;
        }
        listen(&file, Backlog::MAXCONN)?;
        Ok(Socket { listener: file.into(), path: path.to_owned(), file: file_of(path) })
    }

    /// Take over a socket that listens at `path`.
    ///
    /// # Errors
    ///
    /// It does not listen.
    pub fn take(file: OwnedFd, path: &Path) -> io::Result<Self> {
        if !getsockopt(&file, AcceptConn)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket handed over does not listen"));
        }
        let listener = UnixListener::from(file);
        listener.set_nonblocking(true)?;
        Ok(Socket { listener, path: path.to_owned(), file: file_of(path) })
    }

    /// The next VMM; None if there is none.
    ///
    /// # Errors
    ///
    /// There are too many open files.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                Ok(Some(stream))
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.file.is_none() || file_of(&self.path) != self.file {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(socket = %self.path.display(), %error, "the socket's file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_bind_replaces_a_stale_socket_and_sets_its_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        std::mem::forget(UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path, 0o600, None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert!(socket.accept().unwrap().is_some());
        assert!(socket.accept().unwrap().is_none());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn test_bind_at_a_file_returns_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        fs::write(&path, "mine").unwrap();
        assert!(Socket::bind(&path, 0o600, None).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn test_drop_leaves_a_file_that_is_not_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = Socket::bind(&path, 0o600, None).unwrap();
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
    }

    #[test]
    fn test_take_wants_a_listening_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        assert!(Socket::take(stream.into(), &path).is_err());
        drop(Socket::take(listener.into(), &path).unwrap());
        assert!(!path.exists());
    }
}
