//! Writing tensors such that a file is there whole or not at all.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use safetensors::{Dtype, SafeTensorError, View};

use super::WeightsError;

/// Writes tensors as float32 safetensors, with `description` under the key `sconce` of the
/// metadata. They go to a temporary file in the same folder, which is synced and renamed: whatever
/// happens, the path holds what it held before or all of this.
///
/// # Errors
/// Where the tensors cannot be read or the file cannot be written; what was there is left.
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    description: String,
) -> Result<(), WeightsError> {
    let values = tensors
        .iter()
        .map(|(name, tensor)| {
            let tensor = tensor
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F32)?
                .contiguous()?;
            Ok((name.as_str(), Float32(tensor)))
        })
        .collect::<candle_core::Result<Vec<_>>>();
    let values = values.map_err(|e| WeightsError::Format {
        path: path.display().to_string(),
        reason: e.to_string(),
    })?;
    let metadata = HashMap::from([("sconce".to_string(), description)]);
    write_whole(path, |temporary| {
        safetensors::serialize_to_file(values, Some(metadata), temporary).map_err(|e| match e {
            SafeTensorError::IoError(e) => e,
            other => io::Error::other(other.to_string()),
        })
    })
    .map_err(|error| WeightsError::Io {
        path: path.display().to_string(),
        error,
    })
}

/// Lets `write` fill a temporary file beside `path`, syncs it, and puts it in the place of `path`.
///
/// # Errors
/// Where that fails; then what was there is left, and the temporary file is gone.
pub fn write_whole(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(path);
    let written = write(&temporary)
        .and_then(|()| File::options().write(true).open(&temporary)?.sync_all())
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
        return written;
    }
    // The new name itself, where the system lets folders be synced.
    if let Some(folder) = path.parent()
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}

fn temporary_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// A contiguous float32 tensor on the CPU.
struct Float32(Tensor);

impl View for Float32 {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.0.dims()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values = self.0.flatten_all().and_then(|t| t.to_vec1::<f32>());
        let values = values.unwrap_or_default();
        let mut bytes = Vec::with_capacity(values.len() * size_of::<f32>());
        for value in values {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.0.elem_count() * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::params::TensorSource;
    use crate::weights::Checkpoint;

    #[test]
    fn what_is_written_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
        let matrix = tensor.reshape((2, 3)).unwrap().t().unwrap();
        let tensors = BTreeMap::from([("a.b".to_string(), matrix), ("c".to_string(), tensor)]);
        write_tensors(&path, &tensors, "text".into()).unwrap();
        let file = Checkpoint::open(&path).unwrap();
        assert_eq!(file.description(), Some("text"));
        assert_eq!(file.shape("a.b").unwrap(), [3, 2]);
        assert_eq!(file.read("a.b").unwrap(), [0., 3., 1., 4., 2., 5.]);
        let bytes = fs::read(&path).unwrap();
        write_tensors(&path, &tensors, "text".into()).unwrap();
        assert_eq!(bytes, fs::read(&path).unwrap());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "good").unwrap();
        let failed = write_whole(&path, |temporary| {
            fs::write(temporary, "half")?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert_eq!(failed.unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(fs::read(&path).unwrap(), b"good");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    }
}
