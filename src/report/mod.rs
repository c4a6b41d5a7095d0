//! What people and programs read.

mod charts;
mod classification;
mod earlier;
mod embeddings;
mod evaluation;
mod inside;
mod models;
mod page;
mod plot;
mod run;
mod shards;
mod tensorboard;
mod thumbnails;
mod weights;

use std::io;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::weights::write_whole;

pub use classification::{Format, Prediction, Ranked, Ranking, Record, Writer};
pub use earlier::Earlier;
pub use embeddings::{EmbeddingFile, EmbeddingFormat};
pub use evaluation::{Calibration, Judgement, write_classes};
pub use inside::{Colormap, Overlay, contact_sheet, feature_grid, filters, histograms};
pub use models::{
    ListedLayer, ListedModel, ListedWeights, layers, list, write_layers, write_table,
};
pub use page::{Balance, Epoch, Page};
pub use plot::{Plot, PlotError, confusion_matrix};
pub use run::{CONFUSION_FILE, REPORT_FILE, RunReport, remove_reports};
pub use shards::{INDEX_FILE, Index, IndexEntry, Shard};
pub use tensorboard::{EventFile, Setting, Step};
pub use weights::{write_differences, write_kernels};

/// Why a report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error("{path}: {error}")]
    Io { path: String, error: io::Error },
    #[error(transparent)]
    Plot(#[from] PlotError),
}

impl ReportError {
    fn io(path: &Path, error: io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            error,
        }
    }
}

/// Writes a file whole or not at all, in a folder that is made where it is missing.
///
/// # Errors
/// Where that fails.
pub fn write_file(path: &Path, content: &[u8]) -> Result<(), ReportError> {
    let folder = path.parent().map_or(Ok(()), std::fs::create_dir_all);
    let written =
        folder.and_then(|()| write_whole(path, |temporary| std::fs::write(temporary, content)));
    written.map_err(|error| ReportError::io(path, error))
}

/// A share as people read it.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Bytes as an address that holds them.
fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

/// A word of a shell's command.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
