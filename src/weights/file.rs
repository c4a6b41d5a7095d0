//! Reading safetensors, from a mapped file or from the binary itself.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::exec::params::TensorSource;

/// Why a weights file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{path}: {source}")]
    Io {
        path: String,
        source: std::io::Error,
    },
    #[error("{path}: not a safetensors file: {reason}{}", hint(.path))]
    Format { path: String, reason: String },
    #[error(
        "{path}: its description is not one that this version reads: {reason} (get a newer sconce, or give the architecture with -m NAME --weights FILE)"
    )]
    Description { path: String, reason: String },
}

fn hint(path: &str) -> &'static str {
    let extension = Path::new(path).extension().and_then(|e| e.to_str());
    match extension {
        Some("pth" | "pt" | "bin") => {
            " (a PyTorch checkpoint: save it with safetensors.torch.save_file first)"
        }
        _ => "",
    }
}

/// Tensors of a safetensors file, widened to float32 as they are read.
pub struct SafetensorsFile {
    bytes: Bytes,
    tensors: HashMap<String, Entry>,
    /// The text that sconce keeps in its own files.
    description: Option<String>,
}

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl SafetensorsFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// Where it cannot be opened or is not well-formed; the message names the path.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let shown = path.display().to_string();
        let io = |source| WeightsError::Io {
            path: shown.clone(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(io(std::io::ErrorKind::IsADirectory.into()));
        }
        // SAFETY: the map is read-only and private; as with every mapped file, a writer that
        // shortens it meanwhile ends the process, it does not corrupt it.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::parse(Bytes::Mapped(map)).map_err(|reason| WeightsError::Format {
            path: shown,
            reason,
        })
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

    fn parse(bytes: Bytes) -> Result<Self, String> {
        let data = bytes.as_slice();
        let (header_length, metadata) =
            SafeTensors::read_metadata(data).map_err(|e| e.to_string())?;
        // The length field takes eight bytes.
        let data_start = header_length + 8;
        let tensors = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (start, end) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    start: data_start + start,
                    end: data_start + end,
                };
                (name, entry)
            })
            .collect::<HashMap<_, _>>();
        if tensors.values().any(|t| t.end > data.len()) {
            return Err("it is cut short".into());
        }
        let text = metadata.metadata().as_ref();
        let description = text.and_then(|m| m.get("sconce")).cloned();
        Ok(Self {
            bytes,
            tensors,
            description,
        })
    }

    /// What the file says of itself, where sconce wrote it.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

impl TensorSource for SafetensorsFile {
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
        let bytes = &self.bytes.as_slice()[entry.start..entry.end];
        Ok(match entry.dtype {
            Dtype::F32 => widen(bytes, f32::from_le_bytes),
            Dtype::F64 => widen(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => widen(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => widen(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            other => candle_core::bail!("tensor {name}: weights of type {other:?} are not read"),
        })
    }
}

fn widen<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&chunk| value(chunk)).collect()
}
