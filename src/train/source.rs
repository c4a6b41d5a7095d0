use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor};

use super::metrics::Evaluation;
use super::team::Rows;
use crate::data::{Batch, BatchPlan, Batches, Skipped, mirror};
use crate::exec::{Runner, head_logits};
use crate::graph::Graph;
use crate::ranks::Ranks;

/// What a training step takes in.
pub(super) struct Inputs {
    /// Images `[N, 3, H, W]`, or features `[N, F]`; one of zeros where there are none.
    pub tensor: Tensor,
    pub labels: Vec<usize>,
    /// As [`Batch::own_share`].
    pub own_share: Option<f64>,
    pub skipped: Vec<Skipped>,
}

/// Batches to train on, of images or of what a frozen backbone makes of them.
pub(super) struct Source {
    pub plan: BatchPlan,
    device: Device,
    backbone: Option<Backbone>,
}

/// A frozen backbone.
struct Backbone {
    runner: Runner,
    /// The features of all samples, where they are always the same.
    features: Option<Features>,
}

/// Features of samples.
pub(super) struct Features {
    /// `[M, F]`
    pub tensor: Tensor,
    /// Of the same images seen in a mirror, `[M, F]`.
    pub mirrored: Option<Vec<f32>>,
    /// For each sample its row; None where it could not be read.
    rows: Vec<Option<u32>>,
    /// Classes of the rows.
    pub labels: Vec<usize>,
    /// Samples of the rows.
    pub samples: Vec<usize>,
}

impl Features {
    /// Computes the features of every sample, and of its mirror image too where `mirrored` says
    /// so; `done` hears of the progress. None where it says that this is enough.
    pub fn compute(
        runner: &mut Runner,
        plan: &BatchPlan,
        mirrored: bool,
        device: &Device,
        ranks: &Ranks,
        done: &mut dyn FnMut(usize, &[Skipped]) -> bool,
    ) -> Result<Option<Self>> {
        let size = plan.preprocessing.crop;
        let mut own = Rows::default();
        let (mut seen, mut go_on) = (0, true);
        for batch in plan.evaluation()? {
            if !batch.labels.is_empty() {
                own.add(&batch, runner.run(&batch.pixels, batch.labels.len())?);
                if mirrored {
                    // Its rows follow each other as those of one high image would.
                    let pixels = mirror(&batch.pixels, size);
                    own.mirrored
                        .extend(runner.run(&pixels, batch.labels.len())?);
                }
            }
            seen += batch.labels.len() + batch.skipped.len();
            go_on = done(seen, &batch.skipped);
            if !go_on {
                break;
            }
        }
        if ranks.any(!go_on) {
            return Ok(None);
        }
        let Rows {
            values,
            mirrored: others,
            labels,
            samples,
        } = own.of_all(ranks);
        let mut rows = vec![None; plan.samples.len()];
        for (row, &sample) in samples.iter().enumerate() {
            rows[sample] = Some(row as u32);
        }
        let width = values.len().checked_div(labels.len()).unwrap_or(0);
        Ok(Some(Self {
            tensor: Tensor::from_vec(values, (labels.len(), width), device)?,
            mirrored: mirrored.then_some(others),
            rows,
            labels,
            samples,
        }))
    }
}

impl Features {
    /// Counts what the head among `weights` makes of the samples.
    pub fn evaluate(
        &self,
        graph: &Graph,
        weights: &BTreeMap<String, Tensor>,
        evaluation: &mut Evaluation,
    ) -> Result<()> {
        let mut head = Vec::new();
        for parameter in &graph.head().parameters {
            match weights.get(&parameter.name) {
                Some(tensor) => head.push(tensor.detach()),
                None => candle_core::bail!("parameter {} is missing", parameter.name),
            }
        }
        let logits = head_logits(&self.tensor, &head[0], head.get(1))?;
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        evaluation.add(&logits, &self.labels, &self.samples);
        Ok(())
    }
}

impl Source {
    pub fn images(plan: BatchPlan, device: &Device) -> Self {
        Self {
            plan,
            device: device.clone(),
            backbone: None,
        }
    }

    /// Features that `runner` gives; `features` where they are known for every sample already.
    pub fn behind(
        runner: Runner,
        features: Option<Features>,
        plan: BatchPlan,
        device: &Device,
    ) -> Self {
        Self {
            plan,
            device: device.clone(),
            backbone: Some(Backbone { runner, features }),
        }
    }

    /// An epoch's batches, from `first` on.
    pub fn epoch(&mut self, epoch: u64, first: usize) -> Result<Epoch<'_>> {
        let features = self.backbone.as_ref().and_then(|b| b.features.as_ref());
        let batches = match features {
            None => Kind::Read(self.plan.training(epoch, first)?),
            Some(_) => Kind::Known(self.plan.training_samples(epoch, first).into_iter()),
        };
        Ok(Epoch {
            source: self,
            batches,
        })
    }
}

/// A pass over the samples.
pub(super) struct Epoch<'a> {
    source: &'a mut Source,
    batches: Kind,
}

enum Kind {
    Read(Batches),
    /// Batches of positions of samples whose features are known.
    Known(std::vec::IntoIter<Vec<usize>>),
}

impl Epoch<'_> {
    /// The next batch.
    pub fn next(&mut self) -> Option<Result<Inputs>> {
        match &mut self.batches {
            Kind::Read(batches) => {
                let batch = batches.next()?;
                Some(self.source.read(batch))
            }
            Kind::Known(batches) => batches.next().map(|samples| self.source.known(&samples)),
        }
    }
}

impl Source {
    fn read(&mut self, mut batch: Batch) -> Result<Inputs> {
        let count = batch.labels.len().max(1);
        let size = self.plan.preprocessing.crop;
        if batch.labels.is_empty() {
            batch.pixels = vec![0.0; size * size * 3];
        }
        let tensor = match &mut self.backbone {
            Some(backbone) => {
                let values = backbone.runner.run(&batch.pixels, count)?;
                let width = values.len() / count;
                Tensor::from_vec(values, (count, width), &self.device)?
            }
            // Pixel after pixel in memory, seen as [N, 3, H, W].
            None => Tensor::from_vec(batch.pixels, (count, size, size, 3), &self.device)?
                .permute((0, 3, 1, 2))?,
        };
        Ok(Inputs {
            tensor,
            labels: batch.labels,
            own_share: batch.own_share,
            skipped: batch.skipped,
        })
    }

    fn known(&self, samples: &[usize]) -> Result<Inputs> {
        let features = self.backbone.as_ref().and_then(|b| b.features.as_ref());
        let Some(features) = features else {
            candle_core::bail!("features that were not computed");
        };
        let rows: Vec<u32> = samples.iter().filter_map(|&s| features.rows[s]).collect();
        let labels = rows.iter().map(|&row| features.labels[row as usize]);
        let labels = labels.collect();
        let tensor = if rows.is_empty() {
            let width = features.tensor.dim(1)?;
            Tensor::zeros((1, width), DType::F32, &self.device)?
        } else {
            let rows = Tensor::new(rows, &self.device)?;
            features.tensor.index_select(&rows, 0)?
        };
        Ok(Inputs {
            tensor,
            labels,
            own_share: None,
            skipped: Vec::new(),
        })
    }
}
