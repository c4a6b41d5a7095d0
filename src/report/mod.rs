//! What people and programs read.

mod classification;
mod evaluation;
mod models;

pub use classification::{Format, Prediction, Ranked, Ranking, Record, Writer};
pub use evaluation::{Calibration, Judgement, write_classes};
pub use models::{
    ListedLayer, ListedModel, ListedWeights, layers, list, write_layers, write_table,
};
