//! Event files as TensorBoard reads them: records with checksums, each an `Event` message of
//! tensorboard/compat/proto/event.proto.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::weights::protobuf;

type Message = protobuf::Message<Infallible>;

/// How the names of event files begin.
const PREFIX: &str = "events.out.tfevents.";

/// An event file that grows.
pub struct EventFile {
    file: File,
}

/// What can be said of one step.
#[derive(Default)]
pub struct Step {
    summary: Message,
}

/// The value of a hyper-parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum Setting {
    Number(f64),
    Text(String),
    Switch(bool),
}

impl EventFile {
    /// Begins a file in `folder`, beside those that are there: TensorBoard joins them.
    ///
    /// # Errors
    /// Where it cannot be written; likewise below.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let seconds = now() as u64;
        // A name that is free, and later than the others in the order of names.
        let mut number = 0;
        let file = loop {
            let path = folder.join(format!("{PREFIX}{seconds:010}.{number}.sconce"));
            let mut options = File::options();
            match options.write(true).create_new(true).open(&path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => number += 1,
                file => break file?,
            }
        };
        let mut events = Self { file };
        events.write(Message::default().double(1, now()).text(3, "brain.Event:2"))?;
        Ok(events)
    }

    /// Adds a step, numbered as its epoch.
    pub fn add(&mut self, number: u64, step: Step) -> io::Result<()> {
        let event = Message::default().double(1, now());
        self.write(event.int(2, number as i64).message(5, step.summary))
    }

    /// One record: its length, the length's checksum, the message, the message's checksum.
    fn write(&mut self, event: Message) -> io::Result<()> {
        let mut message = Vec::new();
        event.write(&mut message, |never, _| match never {})?;
        let length = (message.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(message.len() + 16);
        record.extend(length);
        record.extend(masked_checksum(&length).to_le_bytes());
        record.extend(&message);
        record.extend(masked_checksum(&message).to_le_bytes());
        // In one go, so that a run that is killed leaves a whole record or none, nearly always.
        self.file.write_all(&record)
    }
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// CRC-32C, turned and shifted, so that checksums of checksums are not special.
fn masked_checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

impl Step {
    pub fn scalar(self, tag: &str, value: f64) -> Self {
        self.value(Message::default().text(1, tag).float(2, value as f32))
    }

    /// A picture as PNG.
    pub fn image(self, tag: &str, [width, height]: [u32; 2], png: &[u8]) -> Self {
        const RGB: i64 = 3;
        let image = Message::default()
            .int(1, height.into())
            .int(2, width.into())
            .int(3, RGB)
            .bytes(4, png);
        self.value(Message::default().text(1, tag).message(4, image))
    }

    /// How values are distributed; what is no number is left out.
    pub fn histogram(self, tag: &str, values: impl Iterator<Item = f64> + Clone) -> Self {
        const BINS: usize = 30;
        let values = values.filter(|v| v.is_finite());
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
        for value in values.clone() {
            low = low.min(value);
            high = high.max(value);
            count += 1.0;
            sum += value;
            squares += value * value;
        }
        if count == 0.0 {
            return self;
        }
        let width = ((high - low) / BINS as f64).max(f64::MIN_POSITIVE);
        // A bucket holds what is below its limit and not below the one before.
        let mut limits: Vec<f64> = (1..BINS).map(|i| low + width * i as f64).collect();
        limits.push(high.next_up());
        let mut buckets = vec![0.0; BINS];
        for value in values {
            let bucket = limits.partition_point(|&limit| limit <= value);
            buckets[bucket.min(BINS - 1)] += 1.0;
        }
        let histogram = Message::default()
            .double(1, low)
            .double(2, high)
            .double(3, count)
            .double(4, sum)
            .double(5, squares)
            .doubles(6, &limits)
            .doubles(7, &buckets);
        self.value(Message::default().text(1, tag).message(5, histogram))
    }

    /// Hyper-parameters, and the tags of the scalars to compare runs by.
    pub fn settings(self, settings: &[(String, Setting)], metrics: &[&str]) -> Self {
        let mut experiment = Message::default();
        let mut start = Message::default();
        for (name, setting) in settings {
            let (kind, value) = match setting {
                Setting::Text(text) => (1, Message::default().text(3, text)),
                Setting::Switch(on) => (2, Message::default().int(4, i64::from(*on))),
                Setting::Number(number) => (3, Message::default().double(2, *number)),
            };
            let info = Message::default().text(1, name).int(4, kind);
            experiment = experiment.message(4, info);
            start = start.message(1, Message::default().text(1, name).message(2, value));
        }
        for metric in metrics {
            let name = Message::default().text(2, metric);
            experiment = experiment.message(5, Message::default().message(1, name));
        }
        let start = start.double(5, now());
        self.plugin("_hparams_/experiment", 2, experiment).plugin(
            "_hparams_/session_start_info",
            3,
            start,
        )
    }

    /// The run is through.
    pub fn end(self) -> Self {
        const SUCCESS: i64 = 1;
        let end = Message::default().int(1, SUCCESS).double(2, now());
        self.plugin("_hparams_/session_end_info", 4, end)
    }

    fn plugin(self, tag: &str, field: u32, content: Message) -> Self {
        let mut bytes = Vec::new();
        // Into memory: nothing that could fail.
        let _ = Message::default()
            .message(field, content)
            .write(&mut bytes, |never, _| match never {});
        let plugin = Message::default().text(1, "hparams").bytes(2, &bytes);
        let metadata = Message::default().message(1, plugin);
        self.value(Message::default().text(1, tag).message(9, metadata))
    }

    fn value(self, value: Message) -> Self {
        Self {
            summary: self.summary.message(1, value),
        }
    }
}

/// The last step in the event files of `folder`, where there is one. A record that was cut short
/// and what follows it do not count, as they do not for TensorBoard.
pub fn last_step(folder: &Path) -> Option<u64> {
    let files = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    let files = files.filter(|f| f.file_name().to_string_lossy().starts_with(PREFIX));
    let steps = files.filter_map(|file| steps(&fs::read(file.path()).ok()?).max());
    steps.max()
}

/// Removes the event files of `folder`.
///
/// # Errors
/// Where that fails.
pub fn remove_events(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The steps of records as [`EventFile`] writes them: the time comes first, then the step.
fn steps(mut bytes: &[u8]) -> impl Iterator<Item = u64> {
    const TIME: usize = 9;
    const STEP: u8 = 2 << 3;
    let records = std::iter::from_fn(move || {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let end = length.checked_add(8)?;
        let record = rest.get(4..end - 4)?;
        bytes = rest.get(end..)?;
        Some(record)
    });
    records.filter_map(|record| {
        let (&key, digits) = record.get(TIME..)?.split_first()?;
        if key != STEP {
            return None;
        }
        let length = digits.iter().position(|digit| digit & 0x80 == 0)? + 1;
        let value = digits[..length.min(9)].iter().rev();
        Some(value.fold(0, |value, digit| value << 7 | u64::from(digit & 0x7f)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_format() {
        // RFC 3720's vector of 32 zeros, masked as tfrecord does.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let turned = 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_checksum(&[0; 32]), turned);
    }

    #[test]
    fn the_last_step_is_found_also_behind_a_torn_record() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(last_step(folder.path()), None);
        for steps in [[3, 300], [4, 5]] {
            let mut file = EventFile::create(folder.path()).unwrap();
            for step in steps {
                file.add(step, Step::default().scalar("a", 1.0)).unwrap();
            }
        }
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2);
        assert_eq!(last_step(folder.path()), Some(300));
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        }
        assert_eq!(last_step(folder.path()), Some(4));
        fs::write(folder.path().join(format!("{PREFIX}x")), [255; 40]).unwrap();
        assert_eq!(last_step(folder.path()), Some(4));
        remove_events(folder.path()).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    }
}
