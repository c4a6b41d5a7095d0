//! A reader of Python's pickle format that builds data and runs nothing.
//!
//! The stream is a program for a small stack machine. Where it asks for a class to be called, the
//! reader notes the class's name and the arguments as an inert [`Object::Instance`]; what those
//! mean is for [`super::torch`] to say. Containers live in one heap and refer to each other by
//! index, so that neither deep nesting nor cycles cost stack or memory.

use std::collections::HashMap;

/// A value of the stream; strings are slices of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(&'a str),
    /// Something that no checkpoint's tensors need: bytes, an integer of more than 64 bits.
    Other,
    Ref(Id),
}

/// Index into [`Pickle`]'s heap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Id(usize);

/// What lives on the heap.
#[derive(Debug)]
pub enum Object<'a> {
    /// Also a set.
    List(Vec<Value<'a>>),
    Tuple(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// A class or function that the stream names.
    Class {
        module: &'a str,
        name: &'a str,
    },
    Instance(Box<Instance<'a>>),
    /// A persistent id: what torch.save puts in the place of a storage.
    Persistent(Value<'a>),
}

/// What calling a class would have made.
#[derive(Debug)]
pub struct Instance<'a> {
    pub class: Value<'a>,
    pub arguments: Value<'a>,
    pub items: Vec<(Value<'a>, Value<'a>)>,
}

/// A value and all that it refers to.
pub struct Pickle<'a> {
    objects: Vec<Object<'a>>,
    pub root: Value<'a>,
    /// Bytes that the stream took.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    pub fn object(&self, value: Value<'a>) -> Option<&Object<'a>> {
        match value {
            Value::Ref(Id(index)) => self.objects.get(index),
            _ => None,
        }
    }

    /// A reference to every object.
    pub fn all(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        (0..self.objects.len()).map(|index| Value::Ref(Id(index)))
    }

    /// The elements of a tuple or a list.
    pub fn elements(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match self.object(value)? {
            Object::Tuple(values) | Object::List(values) => Some(values),
            _ => None,
        }
    }

    /// The entries of a dict, or of an instance that has some (`OrderedDict`).
    pub fn entries(&self, value: Value<'a>) -> Option<&[(Value<'a>, Value<'a>)]> {
        match self.object(value)? {
            Object::Dict(entries) => Some(entries),
            Object::Instance(instance) => {
                let empty = instance.items.is_empty() && self.is_dict_class(instance.class);
                (empty || !instance.items.is_empty()).then_some(&instance.items)
            }
            _ => None,
        }
    }

    fn is_dict_class(&self, class: Value<'a>) -> bool {
        matches!(
            self.object(class),
            Some(Object::Class {
                name: "OrderedDict" | "dict" | "defaultdict",
                ..
            })
        )
    }

    /// The name of an instance's class, as `module.name`.
    pub fn class_of(&self, value: Value<'a>) -> Option<String> {
        let Object::Instance(instance) = self.object(value)? else {
            return None;
        };
        match self.object(instance.class)? {
            Object::Class { module, name } => Some(format!("{module}.{name}")),
            _ => None,
        }
    }
}

/// Reads one pickle from the start of `bytes`.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read(bytes: &[u8]) -> Result<Pickle<'_>, String> {
    let mut machine = Machine {
        bytes,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        objects: Vec::new(),
        // An object takes some dozens of bytes, so that a hostile stream costs a small multiple
        // of its own size; a state dict needs one object for several bytes.
        most_objects: (1 << 16) + bytes.len() / 4,
    };
    let root = machine.run()?;
    Ok(Pickle {
        objects: machine.objects,
        root,
        length: machine.at,
    })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack at which marks were set.
    marks: Vec<usize>,
    memo: HashMap<u64, Value<'a>>,
    objects: Vec<Object<'a>>,
    most_objects: usize,
}

const CUT_SHORT: &str = "its pickle is cut short";

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Value<'a>, String> {
        loop {
            let start = self.at;
            let opcode = self.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode, start)?;
            if self.stack.len() > self.most_objects || self.memo.len() > self.most_objects {
                return Err("its pickle holds more than a checkpoint would".into());
            }
        }
    }

    fn step(&mut self, opcode: u8, start: usize) -> Result<(), String> {
        match opcode {
            // Protocol version, frame: lengths that a reader of bytes does not need.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => match self.marks.last() {
                Some(&mark) if mark == self.stack.len() => drop(self.marks.pop()),
                _ => drop(self.pop()?),
            },
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = *self
                    .stack
                    .last()
                    .ok_or("its pickle takes from an empty stack")?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'I' => {
                let value = match self.line()? {
                    "00" => Value::Bool(false),
                    "01" => Value::Bool(true),
                    digits => integer(digits)?,
                };
                self.stack.push(value);
            }
            b'L' => {
                let value = integer(self.line()?.trim_end_matches('L'))?;
                self.stack.push(value);
            }
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.stack.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.stack.push(Value::Int(value.into()));
            }
            0x8a => {
                let length = self.byte()?.into();
                self.long(length)?;
            }
            0x8b => {
                let length = self.length4()?;
                self.long(length)?;
            }
            b'F' => {
                let text = self.line()?;
                let value = text.parse().map_err(|_| format!("{text:?} is no number"))?;
                self.stack.push(Value::Float(value));
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.stack.push(Value::Float(value));
            }
            b'S' => {
                let quoted = self.line()?;
                let inner = ['\'', '"']
                    .iter()
                    .find_map(|&q| quoted.strip_prefix(q)?.strip_suffix(q));
                self.stack.push(Value::Str(inner.unwrap_or(quoted)));
            }
            b'V' => {
                let text = self.line()?;
                self.stack.push(Value::Str(text));
            }
            b'U' | 0x8c => {
                let length = self.byte()?.into();
                self.text(length)?;
            }
            b'T' | b'X' => {
                let length = self.length4()?;
                self.text(length)?;
            }
            0x8d => {
                let length = self.length8()?;
                self.text(length)?;
            }
            b'C' => {
                let length = self.byte()?.into();
                self.skip(length)?;
            }
            b'B' => {
                let length = self.length4()?;
                self.skip(length)?;
            }
            0x8e | 0x96 => {
                let length = self.length8()?;
                self.skip(length)?;
            }
            b']' | 0x8f => self.push_object(Object::List(Vec::new()))?,
            b')' => self.push_object(Object::Tuple(Vec::new()))?,
            b'}' => self.push_object(Object::Dict(Vec::new()))?,
            b'l' | 0x91 => {
                let values = self.pop_mark()?;
                self.push_object(Object::List(values))?;
            }
            b't' => {
                let values = self.pop_mark()?;
                self.push_object(Object::Tuple(values))?;
            }
            0x85..=0x87 => {
                let values = self.pop_many(usize::from(opcode - 0x84))?;
                self.push_object(Object::Tuple(values))?;
            }
            b'd' => {
                let values = self.pop_mark()?;
                self.push_object(Object::Dict(pairs(&values)?))?;
            }
            b'a' => {
                let value = self.pop()?;
                self.append(&[value]);
            }
            b'e' | 0x90 => {
                let values = self.pop_mark()?;
                self.append(&values);
            }
            b's' => {
                let values = self.pop_many(2)?;
                self.set_items(&values)?;
            }
            b'u' => {
                let values = self.pop_mark()?;
                self.set_items(&values)?;
            }
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.push_object(Object::Class { module, name })?;
            }
            0x93 => match self.pop_many(2)?[..] {
                [Value::Str(module), Value::Str(name)] => {
                    self.push_object(Object::Class { module, name })?;
                }
                _ => return Err("its pickle names a class by something else than text".into()),
            },
            // A class is called: noted, not done.
            b'R' | 0x81 => match self.pop_many(2)?[..] {
                [class, arguments] => self.instance(class, arguments)?,
                _ => return Err(CUT_SHORT.into()),
            },
            0x92 => match self.pop_many(3)?[..] {
                [class, arguments, _] => self.instance(class, arguments)?,
                _ => return Err(CUT_SHORT.into()),
            },
            b'i' => {
                let module = self.line()?;
                let name = self.line()?;
                let arguments = self.pop_mark()?;
                let class = self.add(Object::Class { module, name })?;
                let arguments = self.add(Object::Tuple(arguments))?;
                self.instance(class, arguments)?;
            }
            b'o' => {
                let values = self.pop_mark()?;
                let Some((&class, arguments)) = values.split_first() else {
                    return Err("its pickle makes an object of no class".into());
                };
                let arguments = self.add(Object::Tuple(arguments.to_vec()))?;
                self.instance(class, arguments)?;
            }
            // An object's state: no tensor of a state dict is kept there.
            b'b' => drop(self.pop()?),
            b'p' => {
                let key = self.line()?;
                let key = key.parse().map_err(|_| format!("{key:?} is no index"))?;
                self.remember(key)?;
            }
            b'q' => {
                let key = self.byte()?.into();
                self.remember(key)?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?).into();
                self.remember(key)?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'g' => {
                let key = self.line()?;
                let key = key.parse().map_err(|_| format!("{key:?} is no index"))?;
                self.recall(key)?;
            }
            b'h' => {
                let key = self.byte()?.into();
                self.recall(key)?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?).into();
                self.recall(key)?;
            }
            b'P' => {
                let id = Value::Str(self.line()?);
                self.push_object(Object::Persistent(id))?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push_object(Object::Persistent(id))?;
            }
            other => {
                return Err(format!(
                    "its pickle has the unknown opcode {other:#04x} at byte {start}"
                ));
            }
        }
        Ok(())
    }

    fn add(&mut self, object: Object<'a>) -> Result<Value<'a>, String> {
        if self.objects.len() >= self.most_objects {
            return Err("its pickle holds more than a checkpoint would".into());
        }
        self.objects.push(object);
        Ok(Value::Ref(Id(self.objects.len() - 1)))
    }

    fn push_object(&mut self, object: Object<'a>) -> Result<(), String> {
        let value = self.add(object)?;
        self.stack.push(value);
        Ok(())
    }

    fn instance(&mut self, class: Value<'a>, arguments: Value<'a>) -> Result<(), String> {
        self.push_object(Object::Instance(Box::new(Instance {
            class,
            arguments,
            items: Vec::new(),
        })))
    }

    fn top_object(&mut self) -> Option<&mut Object<'a>> {
        match *self.stack.last()? {
            Value::Ref(Id(index)) => self.objects.get_mut(index),
            _ => None,
        }
    }

    fn append(&mut self, values: &[Value<'a>]) {
        // An instance may be a kind of list; none of those holds a tensor.
        if let Some(Object::List(list)) = self.top_object() {
            list.extend_from_slice(values);
        }
    }

    fn set_items(&mut self, values: &[Value<'a>]) -> Result<(), String> {
        let new = pairs(values)?;
        match self.top_object() {
            Some(Object::Dict(entries)) => entries.extend(new),
            Some(Object::Instance(instance)) => instance.items.extend(new),
            _ => return Err("its pickle puts entries into something that takes none".into()),
        }
        Ok(())
    }

    fn remember(&mut self, key: u64) -> Result<(), String> {
        let top = *self
            .stack
            .last()
            .ok_or("its pickle takes from an empty stack")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u64) -> Result<(), String> {
        let value = self.memo.get(&key);
        let value =
            value.ok_or_else(|| format!("its pickle refers to entry {key}, which is not"))?;
        self.stack.push(*value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'a>, String> {
        self.pop_many(1).map(|values| values[0])
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Value<'a>>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count) {
            Some(at) if at >= floor => Ok(self.stack.split_off(at)),
            _ => Err("its pickle takes from an empty stack".into()),
        }
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self
            .marks
            .pop()
            .ok_or("its pickle looks for a mark that is not")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest.get(..count).ok_or(CUT_SHORT)?;
        self.at += count;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|b| b[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| CUT_SHORT.to_string())
    }

    fn length4(&mut self) -> Result<usize, String> {
        let length = u32::from_le_bytes(self.array()?);
        usize::try_from(length).map_err(|_| CUT_SHORT.to_string())
    }

    fn length8(&mut self) -> Result<usize, String> {
        let length = u64::from_le_bytes(self.array()?);
        usize::try_from(length).map_err(|_| CUT_SHORT.to_string())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|&b| b == b'\n').ok_or(CUT_SHORT)?;
        let line = &rest[..length];
        self.at += length + 1;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        utf8(line)
    }

    fn text(&mut self, length: usize) -> Result<(), String> {
        let text = utf8(self.take(length)?)?;
        self.stack.push(Value::Str(text));
        Ok(())
    }

    fn skip(&mut self, length: usize) -> Result<(), String> {
        self.take(length)?;
        self.stack.push(Value::Other);
        Ok(())
    }

    /// A little-endian two's complement integer.
    fn long(&mut self, length: usize) -> Result<(), String> {
        let bytes = self.take(length)?;
        let value = match bytes.last() {
            None => Value::Int(0),
            Some(_) if length > 8 => Value::Other,
            Some(&last) => {
                let mut whole = [if last >= 0x80 { 0xff } else { 0 }; 8];
                whole[..length].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(whole))
            }
        };
        self.stack.push(value);
        Ok(())
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|_| "its pickle holds text that is not UTF-8".into())
}

fn integer(digits: &str) -> Result<Value<'static>, String> {
    match digits.parse() {
        Ok(value) => Ok(Value::Int(value)),
        Err(_) if digits.len() > 18 => Ok(Value::Other),
        Err(_) => Err(format!("{digits:?} is no integer")),
    }
}

fn pairs<'a>(values: &[Value<'a>]) -> Result<Vec<(Value<'a>, Value<'a>)>, String> {
    let (pairs, rest) = values.as_chunks::<2>();
    if !rest.is_empty() {
        return Err("its pickle has a key without a value".into());
    }
    Ok(pairs.iter().map(|&[key, value]| (key, value)).collect())
}
