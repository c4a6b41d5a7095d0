use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, sync_channel};

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
            None => {
                let batches = self.plan.training(epoch, first)?;
                if self.backbone.is_none() && !self.device.is_cpu() {
                    let size = self.plan.preprocessing.crop;
                    Kind::Ahead(ahead(batches, size, self.device.clone())?)
                } else {
                    Kind::Read(batches)
                }
            }
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
    /// Batches whose images are on the device already.
    Ahead(Receiver<Result<Inputs>>),
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
            Kind::Ahead(batches) => batches.recv().ok(),
            Kind::Known(batches) => batches.next().map(|samples| self.source.known(&samples)),
        }
    }
}

/// A batch's pixels; where it has none, those of one black image.
fn or_nothing(pixels: Vec<f32>, batch: &Batch, size: usize) -> Vec<f32> {
    match batch.labels.is_empty() {
        true => vec![0.0; size * size * 3],
        false => pixels,
    }
}

/// A batch's images, pixel after pixel in memory, seen as `[N, 3, H, W]`.
fn on_device(pixels: Vec<f32>, batch: &Batch, size: usize, device: &Device) -> Result<Tensor> {
    let count = batch.labels.len().max(1);
    let pixels = or_nothing(pixels, batch, size);
    Tensor::from_vec(pixels, (count, size, size, 3), device)?.permute((0, 3, 1, 2))
}

/// Copies batches to the device while it computes on those before: the thread has a stream of its own, and
/// hands over what is there.
fn ahead(
    batches: impl Iterator<Item = Batch> + Send + 'static,
    size: usize,
    device: Device,
) -> std::io::Result<Receiver<Result<Inputs>>> {
    let (to, from) = sync_channel(1);
    let copy = move |mut batch: Batch| {
        let pixels = std::mem::take(&mut batch.pixels);
        let tensor = on_device(pixels, &batch, size, &device)?;
        device.synchronize()?;
        Ok(inputs(batch, tensor))
    };
    std::thread::Builder::new()
        .name("copy".into())
        .spawn(move || {
            for batch in batches {
                // Nobody waits for it where training has ended.
                if to.send(copy(batch)).is_err() {
                    break;
                }
            }
        })?;
    Ok(from)
}

fn inputs(batch: Batch, tensor: Tensor) -> Inputs {
    Inputs {
        tensor,
        labels: batch.labels,
        own_share: batch.own_share,
        skipped: batch.skipped,
    }
}

impl Source {
    fn read(&mut self, mut batch: Batch) -> Result<Inputs> {
        let pixels = std::mem::take(&mut batch.pixels);
        let tensor = match &mut self.backbone {
            Some(backbone) => {
                let count = batch.labels.len().max(1);
                let pixels = or_nothing(pixels, &batch, self.plan.preprocessing.crop);
                let values = backbone.runner.run(&pixels, count)?;
                let width = values.len() / count;
                Tensor::from_vec(values, (count, width), &self.device)?
            }
            None => on_device(pixels, &batch, self.plan.preprocessing.crop, &self.device)?,
        };
        Ok(inputs(batch, tensor))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(label: usize) -> Batch {
        Batch {
            pixels: vec![label as f32; 2 * 2 * 3],
            labels: vec![label],
            samples: vec![label],
            skipped: Vec::new(),
            own_share: None,
        }
    }

    #[test]
    fn batches_come_ahead_in_their_order_and_whole() {
        let absent = Batch {
            labels: Vec::new(),
            pixels: Vec::new(),
            ..batch(0)
        };
        let batches = vec![batch(1), absent, batch(2)];
        let found: Vec<Inputs> = ahead(batches.into_iter(), 2, Device::Cpu)
            .unwrap()
            .iter()
            .map(Result::unwrap)
            .collect();
        let values = |inputs: &Inputs| {
            inputs
                .tensor
                .flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
        };
        let labels: Vec<_> = found.iter().map(|inputs| inputs.labels.clone()).collect();
        assert_eq!(labels, [vec![1], vec![], vec![2]]);
        for (inputs, value) in found.iter().zip([1f32, 0.0, 2.0]) {
            assert_eq!(inputs.tensor.dims(), [1, 3, 2, 2]);
            assert_eq!(values(inputs), [value; 12]);
        }
        // Who does not want the rest lets the thread end.
        let endless = std::iter::repeat_with(|| batch(3));
        drop(ahead(endless, 2, Device::Cpu).unwrap());
    }
}
