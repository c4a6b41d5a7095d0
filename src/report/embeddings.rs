//! Vectors of images, as files that other programs read.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::ReportError;
use crate::weights::write_whole;

/// How vectors are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingFormat {
    /// numpy's array `[N, D]`, float32; the paths lie beside it, a JSON array.
    Npy,
    /// The tensor `embeddings` `[N, D]`, float32; the paths are a JSON array in the metadata, under
    /// `paths`.
    Safetensors,
    /// A line an image: its path and its vector, or what was wrong with it.
    JsonLines,
}

impl EmbeddingFormat {
    /// By the ending of the file's name.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "npy" => Some(Self::Npy),
            "safetensors" => Some(Self::Safetensors),
            "jsonl" => Some(Self::JsonLines),
            _ => None,
        }
    }
}

/// A file of vectors that grows image by image; memory holds the paths only. It is there whole or not
/// at all: until the end vectors lie in a file without a name.
pub struct EmbeddingFile {
    path: PathBuf,
    format: EmbeddingFormat,
    width: usize,
    paths: Vec<String>,
    /// Of vectors, or of lines.
    content: BufWriter<File>,
}

#[derive(Serialize)]
struct Line<'a> {
    path: &'a str,
    #[serde(flatten)]
    result: Outcome<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome<'a> {
    Embedding(&'a [f32]),
    Error(&'a str),
}

impl EmbeddingFile {
    /// A file for vectors of `width` values.
    ///
    /// # Errors
    /// Where its folder cannot be written to.
    pub fn create(path: &Path, format: EmbeddingFormat, width: usize) -> Result<Self, ReportError> {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let create = || {
            std::fs::create_dir_all(folder)?;
            tempfile::tempfile_in(folder)
        };
        let content = create().map_err(|error| ReportError::io(path, error))?;
        Ok(Self {
            path: path.to_path_buf(),
            format,
            width,
            paths: Vec::new(),
            content: BufWriter::new(content),
        })
    }

    /// Adds an image's vector.
    ///
    /// # Errors
    /// Where the disk is full, or so.
    pub fn add(&mut self, image: &str, vector: &[f32]) -> Result<(), ReportError> {
        let write = |content: &mut BufWriter<File>| match self.format {
            EmbeddingFormat::JsonLines => line(content, image, Outcome::Embedding(vector)),
            _ => vector
                .iter()
                .try_for_each(|v| content.write_all(&v.to_le_bytes())),
        };
        write(&mut self.content).map_err(|error| ReportError::io(&self.path, error))?;
        self.paths.push(image.to_string());
        Ok(())
    }

    /// Tells of an image without a vector, where the format has a place for that.
    ///
    /// # Errors
    /// As [`EmbeddingFile::add`].
    pub fn failed(&mut self, image: &str, error: &str) -> Result<(), ReportError> {
        if self.format == EmbeddingFormat::JsonLines {
            let told = line(&mut self.content, image, Outcome::Error(error));
            told.map_err(|error| ReportError::io(&self.path, error))?;
        }
        Ok(())
    }

    /// Puts the file in its place.
    ///
    /// # Errors
    /// As [`EmbeddingFile::add`]; what was there before is left.
    pub fn finish(mut self) -> Result<(), ReportError> {
        let failed = |error| ReportError::io(&self.path, error);
        let paths = serde_json::to_string(&self.paths)
            .map_err(io::Error::from)
            .map_err(failed)?;
        let shape = [self.paths.len(), self.width];
        let header = match self.format {
            EmbeddingFormat::Npy => npy_header(shape),
            EmbeddingFormat::Safetensors => safetensors_header(shape, &paths),
            EmbeddingFormat::JsonLines => Vec::new(),
        };
        if self.format == EmbeddingFormat::Npy {
            super::write_file(&self.path.with_extension("json"), paths.as_bytes())?;
        }
        self.content.flush().map_err(failed)?;
        let content = self.content.get_mut();
        content.rewind().map_err(failed)?;
        let mut content = BufReader::new(content);
        write_whole(&self.path, |temporary| {
            let mut file = File::create(temporary)?;
            file.write_all(&header)?;
            io::copy(&mut content, &mut file).map(|_| ())
        })
        .map_err(failed)
    }
}

fn line(content: &mut BufWriter<File>, path: &str, result: Outcome) -> io::Result<()> {
    serde_json::to_writer(&mut *content, &Line { path, result })?;
    content.write_all(b"\n")
}

/// numpy's format 1.0 (<https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>).
fn npy_header([rows, columns]: [usize; 2]) -> Vec<u8> {
    let mut text =
        format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {columns}), }}");
    // Magic, version, length and text fill whole lines of 64 bytes.
    let padded = (10 + text.len() + 1).next_multiple_of(64) - 10;
    text.push_str(&" ".repeat(padded - text.len() - 1));
    text.push('\n');
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.bytes());
    header
}

/// Length and JSON, filled up to whole words of eight bytes.
fn safetensors_header([rows, columns]: [usize; 2], paths: &str) -> Vec<u8> {
    let json = serde_json::json!({
        "__metadata__": { "paths": paths },
        "embeddings": {
            "dtype": "F32",
            "shape": [rows, columns],
            "data_offsets": [0, rows * columns * size_of::<f32>()],
        },
    });
    let mut text = json.to_string();
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text.bytes());
    header
}
