//! sconce classifies images from a terminal, with networks that candle holds and our own plans run.
//!
//! The rooms, each of which uses only those below it: [`cli`], [`report`], [`explain`], [`data`], [`weights`],
//! [`hub`], [`models`], [`exec`], [`ranks`], [`kernels`], [`graph`].

pub mod cli;
pub mod data;
pub mod exec;
pub mod explain;
pub mod graph;
pub mod hub;
pub mod kernels;
pub mod models;
pub mod ranks;
pub mod report;
pub mod train;
pub mod weights;
