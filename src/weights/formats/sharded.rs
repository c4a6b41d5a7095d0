//! Weights that are split over several files, with an index from tensor to file.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path};

use serde::Deserialize;

use super::{Checkpoint, WeightsError};

#[derive(Deserialize)]
struct Index {
    /// From a tensor's name to the file that holds it, beside the index.
    weight_map: BTreeMap<String, String>,
}

/// Whether this is an index: a JSON object. No other format begins so.
pub fn is_index(content: &[u8]) -> bool {
    content.first() == Some(&b'{') || content.starts_with(b"\n{")
}

/// Opens every file that the index names.
pub fn open(path: &Path, content: &[u8]) -> Result<Checkpoint, WeightsError> {
    let format = |reason: String| WeightsError::Format {
        path: path.display().to_string(),
        reason,
    };
    let index: Index = serde_json::from_slice(content)
        .map_err(|e| format(format!("an index without weight_map: {e}")))?;
    let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in index.weight_map {
        by_file.entry(file).or_default().push(tensor);
    }
    let mut whole = Checkpoint {
        files: Vec::new(),
        tensors: HashMap::new(),
        description: None,
    };
    for (file, tensors) in by_file {
        let mut parts = Path::new(&file).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain {
            return Err(format(format!(
                "its index names {file:?}, which is not a file beside it"
            )));
        }
        let part = Checkpoint::open_part(&path.with_file_name(&file))?;
        whole.absorb(part, &tensors).map_err(format)?;
    }
    Ok(whole)
}
