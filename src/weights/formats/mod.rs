//! Weights files, whatever their format, as tensors by name.

mod pickle;
mod safetensors;
mod sharded;
mod torch;

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use ::safetensors::Dtype;
use half::{bf16, f16};
use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

use crate::exec::params::TensorSource;

/// Why a weights file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{path}: {error}")]
    Io { path: String, error: std::io::Error },
    #[error("{path}: cannot be read as weights: {reason}")]
    Format { path: String, reason: String },
    #[error(
        "{path}: its description is not one that this version reads: {reason} (get a newer sconce, or give the architecture with -m NAME --weights FILE)"
    )]
    Description { path: String, reason: String },
}

/// The tensors of a weights file, widened to float32 as they are read.
///
/// [`Checkpoint::open`] takes, by looking at the bytes,
/// - safetensors;
/// - what `torch.save` writes (`.pth`, `.pt`, `.bin`), as a zip archive or the older stream. Its
///   pickle is read as data and never run; the state dict may lie inside a larger checkpoint
///   under a name like `state_dict` or `model`;
/// - the index of weights that are split over several such files
///   (`model.safetensors.index.json`).
///
/// Files are mapped: only what is read costs memory.
pub struct Checkpoint {
    files: Vec<Bytes>,
    tensors: HashMap<String, Entry>,
    /// The text that sconce keeps in its own files.
    description: Option<String>,
}

/// A file's content.
pub(super) enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

/// Where a tensor's values are.
struct Entry {
    /// Index of the file.
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// In elements; None where the values follow each other in row-major order.
    strides: Option<Vec<usize>>,
    /// Bytes of the file. With strides, values may lie anywhere inside.
    start: usize,
    end: usize,
}

impl Checkpoint {
    /// Maps a file and finds its tensors.
    ///
    /// # Errors
    /// Where it cannot be opened or is not well-formed; the message names the path.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let bytes = map(path)?;
        let content = bytes.as_slice();
        if sharded::is_index(content) {
            return sharded::open(path, content);
        }
        Self::parse(bytes).map_err(|reason| format_error(path, reason))
    }

    /// As [`Checkpoint::open`], for a file that an index names: no index itself.
    fn open_part(path: &Path) -> Result<Self, WeightsError> {
        Self::parse(map(path)?).map_err(|reason| format_error(path, reason))
    }

    /// Reads tensors that are part of the program.
    ///
    /// # Errors
    /// Where the bytes are not well-formed.
    pub fn from_static(bytes: &'static [u8]) -> Result<Self, WeightsError> {
        Self::parse(Bytes::Static(bytes)).map_err(|reason| WeightsError::Format {
            path: "embedded weights".into(),
            reason,
        })
    }

    /// Reads tensors that somebody else has brought into memory; an index of several files is no
    /// such thing.
    ///
    /// # Errors
    /// Where the bytes are not well-formed.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, WeightsError> {
        Self::parse(Bytes::Owned(bytes)).map_err(|reason| WeightsError::Format {
            path: "weights in memory".into(),
            reason,
        })
    }

    fn parse(bytes: Bytes) -> Result<Self, String> {
        let content = bytes.as_slice();
        let mut description = None;
        let tensors = if content.starts_with(torch::ZIP_MAGIC) {
            torch::read_zip(content)?
        } else if torch::is_legacy(content) {
            torch::read_legacy(content)?
        } else {
            let parsed = safetensors::read(content).map_err(|e| recognize(content).unwrap_or(e))?;
            description = parsed.1;
            parsed.0
        };
        Ok(Self {
            files: vec![bytes],
            tensors,
            description,
        })
    }

    /// What the file says of itself, where sconce wrote it.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// Takes over another file's tensors of these names.
    ///
    /// # Errors
    /// Names a tensor that is not there.
    fn absorb(&mut self, mut other: Self, names: &[String]) -> Result<(), String> {
        for name in names {
            let mut entry = other
                .tensors
                .remove(name)
                .ok_or_else(|| format!("tensor {name} is not in the file that the index names"))?;
            entry.file += self.files.len();
            self.tensors.insert(name.clone(), entry);
        }
        self.files.append(&mut other.files);
        Ok(())
    }
}

pub(super) fn format_error(path: &Path, reason: String) -> WeightsError {
    WeightsError::Format {
        path: path.display().to_string(),
        reason,
    }
}

/// What a file is that is none of the formats, for the message.
fn recognize(content: &[u8]) -> Option<String> {
    if content.starts_with(b"\x89HDF") {
        return Some("an HDF5 file, as Keras writes it (convert it to safetensors)".into());
    }
    if content.starts_with(b"<") {
        return Some("a web page, not weights (was a download answered by an error?)".into());
    }
    if content.starts_with(b"version https://git-lfs") {
        return Some("a git-lfs pointer, not the weights (run git lfs pull)".into());
    }
    if matches!(content, [0x80, 0..=5, ..]) {
        return Some("a pickle, but not of torch.save".into());
    }
    content.is_empty().then(|| "it is empty".into())
}

pub(super) fn map(path: &Path) -> Result<Bytes, WeightsError> {
    let io = |error| WeightsError::Io {
        path: path.display().to_string(),
        error,
    };
    let file = File::open(path).map_err(io)?;
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    if metadata.len() == 0 {
        return Ok(Bytes::Static(&[]));
    }
    // SAFETY: the map is read-only and private; as with every mapped file, a writer that shortens
    // it meanwhile ends the process, it does not corrupt it.
    unsafe { Mmap::map(&file) }.map(Bytes::Mapped).map_err(io)
}

impl Bytes {
    /// Gives the pages of a mapped range back: a tensor is read once, as a rule, and what was
    /// read would else count as this process's memory until the end.
    fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Bytes::Mapped(map) = self {
            // Whole pages of the usual size; where pages are larger, the system says no to some.
            let page = 4096;
            let start = range.start.next_multiple_of(page);
            let end = range.end / page * page;
            if start < end {
                // SAFETY: the map is of a file and nobody writes to it, so that pages which are
                // given back are read from the file again where somebody wants them.
                let _ = unsafe {
                    map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    pub fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// How many elements a shape has; None where that overflows.
fn num_elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1, |n: usize, &d| n.checked_mul(d))
}

impl TensorSource for Checkpoint {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.shape.clone())
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        let Some(entry) = self.tensors.get(name) else {
            return Err(candle_core::Error::CannotFindTensor { path: name.into() });
        };
        let file = &self.files[entry.file];
        let bytes = &file.as_slice()[entry.start..entry.end];
        let values = match entry.dtype {
            Dtype::F32 => widen(bytes, entry, f32::from_le_bytes),
            Dtype::F64 => widen(bytes, entry, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => widen(bytes, entry, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => widen(bytes, entry, |b| bf16::from_le_bytes(b).to_f32()),
            other => candle_core::bail!("tensor {name}: weights of type {other:?} are not read"),
        };
        file.release(entry.start..entry.end);
        Ok(values)
    }
}

fn widen<const N: usize>(bytes: &[u8], entry: &Entry, value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (stored, _) = bytes.as_chunks::<N>();
    let Some(strides) = &entry.strides else {
        return stored.iter().map(|&chunk| value(chunk)).collect();
    };
    let count = num_elements(&entry.shape).unwrap_or(0);
    let mut index = vec![0; strides.len()];
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        let at: usize = index.iter().zip(strides).map(|(i, s)| i * s).sum();
        values.push(value(stored[at]));
        for (i, &length) in index.iter_mut().zip(&entry.shape).rev() {
            *i += 1;
            if *i < length {
                break;
            }
            *i = 0;
        }
    }
    values
}
