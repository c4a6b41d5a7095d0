use std::io;

use super::state::StateError;
use crate::exec::cpu::PlanError;
use crate::ranks::RANKS_DIFFER;

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("{}", first_line(.0))]
    Device(#[from] candle_core::Error),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("{path}: {error}")]
    Io { path: String, error: io::Error },
    #[error("--freeze {given}: no such part of {model} (expected {expected})")]
    Freeze {
        given: String,
        model: String,
        expected: String,
    },
    #[error(
        "epoch {epoch}, batch {batch}: the {what} is {value} at a learning rate of {rate:.2e} ({})",
        advice(*.clipped, *.rate)
    )]
    Diverged {
        what: &'static str,
        value: f64,
        epoch: u64,
        batch: u64,
        rate: f64,
        clipped: bool,
    },
    #[error("{error}; {kept}")]
    Save { error: String, kept: String },
    #[error("epoch {epoch}: none of the images could be read, the last: {name}: {reason}")]
    NothingRead {
        epoch: u64,
        name: String,
        reason: String,
    },
    #[error("none of the images to validate on could be read, the last: {name}: {reason}")]
    NothingValidated { name: String, reason: String },
    #[error(
        "{path}: the images are not those that the run was started with (give the same data, or start afresh with --force)"
    )]
    OtherData { path: String },
    #[error("{path}: {RANKS_DIFFER}")]
    RanksDiffer { path: String },
    #[error(transparent)]
    State(#[from] StateError),
}

/// What comes after is a backtrace.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().into()
}

fn advice(clipped: bool, rate: f64) -> String {
    let clip = if clipped { "" } else { ", or --clip-norm 1" };
    format!("try --lr {:.0e}, or --warmup 1{clip}", rate / 10.0)
}
