// SPDX-License-Identifier: Apache-2.0

//! A disk: a file or a block device of the server (VIRTIO 1.2, section 5.2).

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use wire::{Code, Device};

use crate::module::{FileTask, FileWork, Module, Next, Request, Written};

/// The unit of offsets and sizes on the wire and in the configuration, in bytes.
pub const SECTOR: u64 = 512;
/// Type, a reserved word, and the sector that it begins with.
const HEADER: usize = 16;
/// Bytes of a serial number.
const SERIAL: usize = 20;
/// Sector, number of sectors, flags.
const RANGE: usize = 16;
/// Flag of a range to write zeroes to: its room may be given back.
const UNMAP: u32 = 1;
const SEGMENTS: u32 = 254;
const QUEUES: u16 = 16;
/// Of a range to discard or to write zeroes to: a GiB.
const MOST_SECTORS: u32 = 1 << 21;

/// How a disk is to be.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The file or block device.
    pub path: PathBuf,
    /// Guests may only read.
    pub read_only: bool,
    /// What guests see as its serial number; 20 bytes of it.
    pub serial: String,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Block {
    file: File,
    sectors: AtomicU64,
    read_only: bool,
    serial: [u8; SERIAL],
}

impl Block {
    /// Open the file.
    ///
    /// # Errors
    ///
    /// It cannot be opened, is neither a file nor a block device, or has a size that is no number of sectors.
    pub fn open(settings: &Settings) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(!settings.read_only);
        let file = options.custom_flags(libc::O_NONBLOCK).open(&settings.path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        let size = (&file).seek(SeekFrom::End(0))?;
        if !size.is_multiple_of(SECTOR) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{size} bytes are no number of sectors")));
        }
        let mut serial = [0; SERIAL];
        let length = settings.serial.len().min(SERIAL);
        serial[..length].copy_from_slice(&settings.serial.as_bytes()[..length]);
        Ok(Block { file, sectors: AtomicU64::new(size / SECTOR), read_only: settings.read_only, serial })
    }

    /// Whether sectors are all on the disk.
    fn holds(&self, sector: u64, bytes: u64) -> bool {
        let end = sector.checked_add(bytes.div_ceil(SECTOR));
        bytes.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= self.sectors.load(Ordering::Acquire))
    }

    fn task(&self, what: FileWork, room: usize) -> Next {
        let reads = matches!(what, FileWork::Read { .. });
        let finish = Box::new(move |bytes, done| {
            let code = if done { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
            with_status(if reads { bytes } else { Vec::new() }, room, code)
        });
        Next::File(FileTask { file: self.file.as_raw_fd(), what, finish })
    }

    fn ranges(&self, kind: u32, data: &[u8], room: usize) -> Next {
        let refused = |code| Next::Done(with_status(Vec::new(), room, code));
        if self.read_only {
            return refused(VIRTIO_BLK_S_IOERR);
        }
        // One range for each request: that is what the configuration says.
        let Ok(range) = <&[u8; RANGE]>::try_from(data) else { return refused(VIRTIO_BLK_S_UNSUPP) };
        let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let (sector, sectors, flags) = (u64::from(word(0)) | u64::from(word(4)) << 32, word(8), word(12));
        let length = u64::from(sectors) * SECTOR;
        if sectors > MOST_SECTORS || !self.holds(sector, length) {
            return refused(VIRTIO_BLK_S_IOERR);
        }
        if flags & !UNMAP != 0 || (kind == VIRTIO_BLK_T_DISCARD && flags != 0) {
            return refused(VIRTIO_BLK_S_UNSUPP);
        }
        if length == 0 {
            return refused(VIRTIO_BLK_S_OK);
        }
        let punch = kind == VIRTIO_BLK_T_DISCARD || flags & UNMAP != 0;
        let mode =
            if punch { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE } | libc::FALLOC_FL_KEEP_SIZE;
        self.task(FileWork::Allocate { mode, offset: sector * SECTOR, length }, room)
    }
}

/// The answer that has its last byte, the status, where the driver looks for it.
fn with_status(mut bytes: Vec<u8>, room: usize, status: u32) -> Written {
    if room == 0 {
        return Err(Code::Failed);
    }
    bytes.resize(room - 1, 0);
    bytes.push(status as u8);
    Ok(bytes)
}

fn kind_of(given: &[u8]) -> Option<(u32, u64, &[u8])> {
    let (header, data) = given.split_first_chunk::<HEADER>()?;
    let [kind, _, low, high] =
        [0, 4, 8, 12].map(|at| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]));
    Some((kind, u64::from(low) | u64::from(high) << 32, data))
}

impl Module for Block {
    fn device(&self) -> Device {
        Device::Block
    }

    fn features(&self) -> u64 {
        let both = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_MQ | 1 << VIRTIO_BLK_F_SEG_MAX;
        let writable = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        both | if self.read_only { 1 << VIRTIO_BLK_F_RO } else { writable }
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    /// `struct virtio_blk_config`.
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.load(Ordering::Acquire).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(34, &QUEUES.to_le_bytes());
        for at in [36, 48] {
            put(at, &MOST_SECTORS.to_le_bytes()); // sectors of a range,
            put(at + 4, &1_u32.to_le_bytes()); // and ranges
        }
        put(44, &1_u32.to_le_bytes()); // which are aligned as they like
        put(56, &[1]); // zeroes may give room back
        config
    }

    fn begin(&self, request: Request) -> Next {
        let room = request.room;
        let Some((kind, sector, data)) = kind_of(&request.given) else { return Next::Done(Err(Code::Failed)) };
        let refused = |code| Next::Done(with_status(Vec::new(), room, code));
        if room == 0 {
            return Next::Done(Err(Code::Failed));
        }
        match kind {
            VIRTIO_BLK_T_IN if !self.holds(sector, room as u64 - 1) => refused(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_IN if room == 1 => refused(VIRTIO_BLK_S_OK),
            VIRTIO_BLK_T_IN => {
                let mut bytes = Vec::with_capacity(room);
                bytes.resize(room - 1, 0);
                self.task(FileWork::Read { bytes, offset: sector * SECTOR }, room)
            }
            VIRTIO_BLK_T_OUT if self.read_only || !self.holds(sector, data.len() as u64) => refused(VIRTIO_BLK_S_IOERR),
            VIRTIO_BLK_T_OUT if data.is_empty() => refused(VIRTIO_BLK_S_OK),
            VIRTIO_BLK_T_OUT => {
                let (bytes, offset) = (request.given, sector * SECTOR);
                self.task(FileWork::Write { bytes, start: HEADER, offset }, room)
            }
            VIRTIO_BLK_T_FLUSH => self.task(FileWork::Sync, room),
            VIRTIO_BLK_T_GET_ID => Next::Done(with_status(self.serial.to_vec(), room, VIRTIO_BLK_S_OK)),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(kind, data, room),
            _ => refused(VIRTIO_BLK_S_UNSUPP),
        }
    }

    fn repeatable(&self, request: &Request) -> bool {
        matches!(kind_of(&request.given), Some((VIRTIO_BLK_T_IN | VIRTIO_BLK_T_FLUSH | VIRTIO_BLK_T_GET_ID, ..)) | None)
    }

    fn resize(&self, size: u64) -> Result<(), String> {
        if !size.is_multiple_of(SECTOR) || size == 0 {
            return Err(format!("{size} bytes are no number of sectors"));
        }
        let metadata = self.file.metadata().map_err(|error| error.to_string())?;
        if metadata.file_type().is_file() && metadata.len() != size {
            self.file.set_len(size).map_err(|error| error.to_string())?;
        }
        let there = (&self.file).seek(SeekFrom::End(0)).map_err(|error| error.to_string())?;
        if there < size {
            return Err(format!("the device has {there} bytes"));
        }
        self.sectors.store(size / SECTOR, Ordering::Release);
        Ok(())
    }
}
