use std::collections::HashMap;

use safetensors::SafeTensors;

use super::Entry;

/// Tensors of a safetensors file, and the text that sconce keeps in its own.
pub fn read(data: &[u8]) -> Result<(HashMap<String, Entry>, Option<String>), String> {
    let (header_length, metadata) = SafeTensors::read_metadata(data).map_err(|e| e.to_string())?;
    // The length field takes eight bytes.
    let data_start = header_length + 8;
    let mut tensors = HashMap::new();
    for (name, info) in metadata.tensors() {
        let (start, end) = info.data_offsets;
        let end = data_start.checked_add(end).filter(|&e| e <= data.len());
        let Some(end) = end else {
            return Err("it is cut short".into());
        };
        let entry = Entry {
            file: 0,
            dtype: info.dtype,
            shape: info.shape.clone(),
            strides: None,
            start: data_start + start,
            end,
        };
        tensors.insert(name, entry);
    }
    let text = metadata.metadata().as_ref();
    let description = text.and_then(|m| m.get("sconce")).cloned();
    Ok((tensors, description))
}
