use std::collections::BTreeMap;

use candle_core::{Device, Result, Tensor};

use super::metrics::Evaluation;
use crate::data::{Batch, BatchPlan, Batches, Skipped, mirror};
use crate::exec::{Runner, head_logits};
use crate::graph::Graph;

/// What a training step takes in.
pub(super) struct Inputs {
    /// Images `[N, 3, H, W]`, or features `[N, F]`.
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
        done: &mut dyn FnMut(usize, &[Skipped]) -> bool,
    ) -> Result<Option<Self>> {
        let (mut values, mut others): (Vec<f32>, Vec<f32>) = Default::default();
        let size = plan.preprocessing.crop;
        let mut rows = vec![None; plan.samples.len()];
        let (mut labels, mut samples) = (Vec::new(), Vec::new());
        let mut seen = 0;
        for batch in plan.evaluation()? {
            for &sample in &batch.samples {
                rows[sample] = Some(labels.len() as u32);
                labels.push(plan.samples[sample].label);
                samples.push(sample);
            }
            if !batch.labels.is_empty() {
                values.extend(runner.run(&batch.pixels, batch.labels.len())?);
                if mirrored {
                    // Its rows follow each other as those of one high image would.
                    let pixels = mirror(&batch.pixels, size);
                    others.extend(runner.run(&pixels, batch.labels.len())?);
                }
            }
            seen += batch.labels.len() + batch.skipped.len();
            if !done(seen, &batch.skipped) {
                return Ok(None);
            }
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
            Some(_) => {
                let mut order = self.plan.order(epoch);
                order.drain(..(first * self.plan.batch_size).min(order.len()));
                Kind::Known(order.into_iter())
            }
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
    /// Positions of samples whose features are known.
    Known(std::vec::IntoIter<usize>),
}

impl Epoch<'_> {
    /// The next batch.
    pub fn next(&mut self) -> Option<Result<Inputs>> {
        match &mut self.batches {
            Kind::Read(batches) => {
                let batch = batches.next()?;
                Some(self.source.read(batch))
            }
            Kind::Known(order) => {
                let size = self.source.plan.batch_size;
                let samples: Vec<usize> = order.by_ref().take(size).collect();
                (!samples.is_empty()).then(|| self.source.known(&samples))
            }
        }
    }
}

impl Source {
    fn read(&mut self, batch: Batch) -> Result<Inputs> {
        let count = batch.labels.len();
        let size = self.plan.preprocessing.crop;
        let tensor = match &mut self.backbone {
            Some(backbone) if count > 0 => {
                let values = backbone.runner.run(&batch.pixels, count)?;
                let width = values.len() / count;
                Tensor::from_vec(values, (count, width), &self.device)?
            }
            // Pixel after pixel in memory, seen as [N, 3, H, W].
            _ => Tensor::from_vec(batch.pixels, (count, size, size, 3), &self.device)?
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
        let rows = Tensor::new(rows, &self.device)?;
        Ok(Inputs {
            tensor: features.tensor.index_select(&rows, 0)?,
            labels,
            own_share: None,
            skipped: Vec::new(),
        })
    }
}
