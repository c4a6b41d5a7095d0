//! What `torch.save` writes: a zip archive, or before 2020 a stream of pickles and raw bytes.

use std::collections::HashMap;
use std::io::Cursor;

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Object, Pickle, Value};
use super::{Entry, num_elements};

/// The first bytes of a zip archive.
pub const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

/// How a legacy stream begins: the integer 0x1950a86a20f9469cfc6c as a pickle of its own.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e";

/// Whether these are the first bytes of a legacy stream.
pub fn is_legacy(bytes: &[u8]) -> bool {
    // The protocol's version; a frame's length from version 4 on.
    let rest = match bytes {
        [0x80, _, 0x95, rest @ ..] => rest.get(8..),
        [0x80, _, rest @ ..] => Some(rest),
        _ => None,
    };
    rest.is_some_and(|rest| rest.starts_with(LEGACY_MAGIC))
}

/// Bytes of a storage within the file.
struct Storage {
    start: usize,
    end: usize,
}

/// Reads the zip form: `NAME/data.pkl`, and a file `NAME/data/KEY` for each storage.
pub fn read_zip(bytes: &[u8]) -> Result<HashMap<String, Entry>, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let mut files = HashMap::new();
    let mut pickles = Vec::new();
    let mut compressed = None;
    for index in 0..archive.len() {
        let file = archive.by_index_raw(index).map_err(|e| e.to_string())?;
        let name = file.name().map_err(|e| e.to_string())?.into_owned();
        if file.compression() != CompressionMethod::Stored {
            compressed.get_or_insert(name);
            continue;
        }
        let start = file.data_start().and_then(|s| usize::try_from(s).ok());
        let size = usize::try_from(file.compressed_size()).ok();
        let end = start.zip(size).and_then(|(s, n)| s.checked_add(n));
        let (Some(start), Some(end)) = (start, end.filter(|&e| e <= bytes.len())) else {
            return Err(format!("{name} in its archive is cut short"));
        };
        if let Some(folder) = name.strip_suffix("data.pkl") {
            pickles.push(folder.to_string());
        }
        files.insert(name, Storage { start, end });
    }
    let folder = match &pickles[..] {
        [folder] => folder,
        [] if compressed.is_some() => {
            return Err("its zip archive is compressed, as torch.save never does".into());
        }
        [] => return Err("a zip archive without the data.pkl of torch.save".into()),
        _ => return Err("a zip archive with several files named data.pkl".into()),
    };
    let in_folder = |name: &str| files.get(&format!("{folder}{name}"));
    if in_folder("constants.pkl").is_some() {
        return Err(
            "a TorchScript archive (save the state dict: torch.save(model.state_dict(), FILE))"
                .into(),
        );
    }
    if let Some(order) = in_folder("byteorder")
        && &bytes[order.start..order.end] != b"little"
    {
        return Err("its bytes are big-endian".into());
    }
    let Storage { start, end } = files[&format!("{folder}data.pkl")];
    let pickle = pickle::read(&bytes[start..end])?;
    state_dict(&pickle)?
        .into_iter()
        .map(|(name, tensor)| {
            let storage = in_folder(&format!("data/{}", tensor.storage))
                .ok_or_else(|| format!("tensor {name}: its storage is not in the archive"))?;
            Ok((name.to_string(), tensor.place(name, storage)?))
        })
        .collect()
}

/// Reads the legacy form: five pickles (magic, protocol, system, data, keys of the storages), then
/// for each key the number of elements and their bytes.
pub fn read_legacy(bytes: &[u8]) -> Result<HashMap<String, Entry>, String> {
    let mut at = 0;
    let mut next = || {
        let pickle = pickle::read(&bytes[at..])?;
        at += pickle.length;
        Ok::<_, String>(pickle)
    };
    next()?;
    let protocol = next()?;
    if protocol.root != Value::Int(1001) {
        return Err("its protocol is not the one of torch.save".into());
    }
    let system = next()?;
    let little = system.entries(system.root).unwrap_or_default();
    if little.contains(&(Value::Str("little_endian"), Value::Bool(false))) {
        return Err("its bytes are big-endian".into());
    }
    let pickle = next()?;
    let keys = next()?;
    let tensors = state_dict(&pickle)?;
    // The size of an element is only told where the data refers to the storage, and any of the
    // file's storages may come before those that are wanted.
    let sizes = pickle.storages();
    let mut storages = HashMap::new();
    let Some(keys) = keys.elements(keys.root) else {
        return Err("its list of storages is not a list".into());
    };
    for &key in keys {
        let Value::Str(key) = key else {
            return Err("its list of storages holds something else than names".into());
        };
        let count: [u8; 8] = bytes
            .get(at..)
            .and_then(|rest| rest.first_chunk().copied())
            .ok_or("it is cut short")?;
        let Some(&size) = sizes.get(key) else {
            return Err(format!("nothing says of what type storage {key} is"));
        };
        let length = usize::try_from(u64::from_le_bytes(count)).ok();
        let start = at + 8;
        let end = length
            .and_then(|n| n.checked_mul(size))
            .and_then(|n| start.checked_add(n))
            .filter(|&end| end <= bytes.len())
            .ok_or("it is cut short")?;
        storages.insert(key, Storage { start, end });
        at = end;
    }
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let storage = storages
                .get(tensor.storage)
                .ok_or_else(|| format!("tensor {name}: its storage is not in the file"))?;
            Ok((name.to_string(), tensor.place(name, storage)?))
        })
        .collect()
}

/// A tensor as the pickle describes it.
struct Tensor<'a> {
    dtype: Dtype,
    storage: &'a str,
    /// In elements.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Tensor<'_> {
    /// Where its values are in the file, after checking that they are all there.
    fn place(self, name: &str, storage: &Storage) -> Result<Entry, String> {
        let outside = || format!("tensor {name}: it reaches beyond its storage");
        let size = element_size(self.dtype);
        let held = (storage.end - storage.start) / size;
        let count = num_elements(&self.shape).ok_or_else(outside)?;
        // The index of the last element, at most.
        let last = self.shape.iter().zip(&self.strides).try_fold(
            self.offset,
            |last, (&length, &stride)| {
                last.checked_add(length.saturating_sub(1).checked_mul(stride)?)
            },
        );
        let fits = count == 0 || last.is_some_and(|last| last < held);
        // An expanded tensor could be of any size, whatever the file's.
        if !fits || count > held {
            return Err(outside());
        }
        let start = storage.start + self.offset.min(held) * size;
        let contiguous = is_contiguous(&self.shape, &self.strides);
        Ok(Entry {
            file: 0,
            dtype: self.dtype,
            strides: (!contiguous).then_some(self.strides),
            end: if contiguous {
                start + count * size
            } else {
                storage.end
            },
            shape: self.shape,
            start,
        })
    }
}

fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    shape.iter().zip(strides).rev().all(|(&length, &stride)| {
        let fits = length == 1 || stride == expected;
        expected *= length.max(1);
        fits
    })
}

/// Bytes of an element, for the types that a storage can have.
fn element_size(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Where training scripts put the weights in a checkpoint that holds more, the likeliest first.
const NESTED: [&str; 9] = [
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "state_dict_ema",
    "model_ema",
];

/// The dict of the pickle that holds most tensors, at the top or inside it.
fn state_dict<'a>(pickle: &Pickle<'a>) -> Result<Vec<(&'a str, Tensor<'a>)>, String> {
    let mut best: Option<(Value, usize, usize)> = None;
    let mut level = vec![(pickle.root, 0)];
    let mut visited = 0;
    for _ in 0..3 {
        let mut deeper = Vec::new();
        for (value, rank) in level {
            let entries = pickle.entries(value).unwrap_or_default();
            visited += entries.len();
            // Dicts that share their parts could be many more than the file's size tells.
            if visited > 1 << 20 {
                return Err("its dicts hold more than a checkpoint would".into());
            }
            let mut tensors = 0;
            for &(key, value) in entries {
                if let Value::Str(key) = key {
                    if pickle.is_tensor(value) {
                        tensors += 1;
                    } else if pickle.entries(value).is_some() {
                        let place = NESTED.iter().position(|&n| n == key);
                        deeper.push((value, place.unwrap_or(NESTED.len())));
                    }
                }
            }
            let better = match best {
                None => tensors > 0,
                Some((_, most, best_rank)) => {
                    tensors > most || (tensors == most && rank < best_rank)
                }
            };
            if better {
                best = Some((value, tensors, rank));
            }
        }
        level = deeper;
    }
    let Some((dict, ..)) = best else {
        return Err(match pickle.class_of(pickle.root) {
            Some(class) if pickle.entries(pickle.root).is_none() => format!(
                "a pickled object of class {class}, which is not run (save the state dict: torch.save(model.state_dict(), FILE))"
            ),
            _ => "it holds no dict of tensors".into(),
        });
    };
    let entries = pickle.entries(dict).unwrap_or_default();
    let mut tensors = Vec::with_capacity(entries.len());
    for &(key, value) in entries {
        let Value::Str(name) = key else { continue };
        match pickle.tensor(value) {
            Some(tensor) => {
                tensors.push((name, tensor.map_err(|e| format!("tensor {name}: {e}"))?))
            }
            None => {
                let class = pickle.class_of(value).unwrap_or_default();
                if class.starts_with("torch._utils._rebuild") {
                    return Err(format!(
                        "tensor {name}: tensors made by {class} are not read"
                    ));
                }
            }
        }
    }
    Ok(tensors)
}

/// Functions whose first arguments are storage, offset, size and strides.
const REBUILD_TENSOR: [&str; 2] = [
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor",
];

/// Functions whose first argument is a tensor.
const REBUILD_PARAMETER: [&str; 2] = [
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
];

impl<'a> Pickle<'a> {
    fn is_tensor(&self, value: Value<'a>) -> bool {
        self.class_of(value).is_some_and(|class| {
            REBUILD_TENSOR.contains(&class.as_str()) || REBUILD_PARAMETER.contains(&class.as_str())
        })
    }

    /// The tensor or parameter that a value stands for; None for anything else.
    fn tensor(&self, value: Value<'a>) -> Option<Result<Tensor<'a>, String>> {
        let class = self.class_of(value)?;
        let arguments = self.arguments(value)?;
        let (class, arguments) = if REBUILD_PARAMETER.contains(&class.as_str()) {
            let inner = *arguments.first()?;
            (self.class_of(inner)?, self.arguments(inner)?)
        } else {
            (class, arguments)
        };
        if !REBUILD_TENSOR.contains(&class.as_str()) {
            return None;
        }
        Some(self.rebuilt(arguments))
    }

    fn arguments(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.object(value)? {
            Object::Instance(instance) => self.elements(instance.arguments),
            _ => None,
        }
    }

    fn rebuilt(&self, arguments: &[Value<'a>]) -> Result<Tensor<'a>, String> {
        let odd = || "its description is not one that torch.save writes".to_string();
        let [storage, offset, shape, strides, ..] = *arguments else {
            return Err(odd());
        };
        let storage = self.storage(storage).ok_or_else(odd)??;
        let size = |value: Value| match value {
            Value::Int(size) => usize::try_from(size).ok(),
            _ => None,
        };
        let sizes = |value: Value<'a>| -> Option<Vec<usize>> {
            // torch.Size is a tuple inside an instance.
            let wrapped = self.arguments(value).and_then(|a| a.first().copied());
            let elements = self.elements(wrapped.unwrap_or(value))?;
            elements.iter().map(|&v| size(v)).collect()
        };
        let shape = sizes(shape).ok_or_else(odd)?;
        let strides = sizes(strides).ok_or_else(odd)?;
        if shape.len() != strides.len() || shape.len() > 8 {
            return Err(odd());
        }
        let offset = size(offset).ok_or_else(odd)?;
        Ok(Tensor {
            dtype: storage.dtype,
            storage: storage.key,
            offset: offset.checked_add(storage.offset).ok_or_else(odd)?,
            shape,
            strides,
        })
    }

    /// What a persistent id says of a storage: `('storage', type, key, device, size[, view])`.
    fn storage(&self, value: Value<'a>) -> Option<Result<StorageId<'a>, String>> {
        let Object::Persistent(id) = self.object(value)? else {
            return None;
        };
        let [
            Value::Str("storage"),
            class,
            Value::Str(key),
            _,
            _,
            ref view @ ..,
        ] = *self.elements(*id)?
        else {
            return None;
        };
        let Object::Class { name, .. } = self.object(class)? else {
            return None;
        };
        let dtype = match *name {
            "FloatStorage" => Dtype::F32,
            "HalfStorage" => Dtype::F16,
            "BFloat16Storage" => Dtype::BF16,
            "DoubleStorage" => Dtype::F64,
            "LongStorage" => Dtype::I64,
            "IntStorage" => Dtype::I32,
            "ShortStorage" => Dtype::I16,
            "CharStorage" => Dtype::I8,
            "ByteStorage" => Dtype::U8,
            "BoolStorage" => Dtype::BOOL,
            other => return Some(Err(format!("values of type {other} are not read"))),
        };
        // In old streams a storage could be part of another: key, offset, size.
        let offset = match view.first().and_then(|&v| self.elements(v)) {
            Some(&[_, Value::Int(offset), ..]) => usize::try_from(offset).ok()?,
            _ => 0,
        };
        Some(Ok(StorageId { dtype, key, offset }))
    }

    /// The size of an element of every storage that the pickle mentions.
    fn storages(&self) -> HashMap<&'a str, usize> {
        self.all()
            .filter_map(|value| self.storage(value)?.ok())
            .map(|storage| (storage.key, element_size(storage.dtype)))
            .collect()
    }
}

struct StorageId<'a> {
    dtype: Dtype,
    key: &'a str,
    offset: usize,
}
