//! The images that a command is given, and how they are read.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use crate::data::{self, Decoder, Inputs, PathList, Watch};

#[derive(Debug, Args)]
pub struct Images {
    /// Images: files, folders (with all below them), quoted globs, `-` for bytes on standard input
    #[arg(value_name = "INPUT")]
    inputs: Vec<PathBuf>,
    /// Read paths from a file, one a line, or from standard input (`-`)
    #[arg(long, value_name = "FILE|-")]
    files_from: Option<PathBuf>,
    /// Paths of --files-from end in NUL
    #[arg(short = '0', requires = "files_from")]
    nul: bool,
    /// Put transparent images on this colour (white, #rgb, ...) instead of dropping transparency
    #[arg(long, value_name = "COLOR", value_parser = data::parse_color)]
    background: Option<[u8; 3]>,
    /// Refuse images of more pixels
    #[arg(long, value_name = "N", default_value_t = super::MAX_PIXELS)]
    max_pixels: u64,
}

impl Images {
    /// The images in order; `command` is who asks.
    ///
    /// # Errors
    /// Where none are named, standard input is to be read twice, or a list cannot be opened.
    pub fn open(&self, command: &str) -> anyhow::Result<Inputs> {
        if self.inputs.is_empty() && self.files_from.is_none() {
            anyhow::bail!(
                "{command}: no images given (name files, folders or globs, or - for standard input)"
            );
        }
        let dashes = self.inputs.iter().chain(&self.files_from);
        if dashes.filter(|path| path.as_os_str() == "-").count() > 1 {
            anyhow::bail!("{command}: standard input can be read once only (give one -)");
        }
        let list = self.files_from.as_deref();
        let list = list
            .map(|path| PathList::open(path, self.nul))
            .transpose()
            .context("--files-from")?;
        Ok(Inputs::new(self.inputs.clone(), list))
    }

    /// The images of folders as they arrive. What lies below `except` is left alone.
    ///
    /// # Errors
    /// Where there is no folder, or what is named cannot be watched.
    pub fn watch(&self, except: Option<&Path>) -> anyhow::Result<Watch> {
        anyhow::ensure!(!self.inputs.is_empty(), "--watch: name folders to watch");
        Ok(Watch::start(self.inputs.clone(), except)?)
    }

    /// `exact` decodes every picture whole.
    pub fn decoder(&self, exact: bool) -> Decoder {
        Decoder {
            max_pixels: self.max_pixels,
            background: self.background,
            exact,
        }
    }
}
