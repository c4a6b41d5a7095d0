use candle_core::{D, Device, Result, Tensor, Var, bail};
use candle_nn::ops::log_softmax;

/// What the images of a batch should be called.
#[derive(Clone, Copy, Debug)]
pub enum Targets<'a> {
    /// A class for each image.
    Classes(&'a [usize]),
    /// A distribution over the classes for each image, `[N, classes]`.
    Distributions(&'a [f32]),
}

/// Distributions `[N, classes]` of images that are mixed with the one before them (the first with the
/// last): the share `own` of each target is its own class's.
pub fn mixed_targets(labels: &[usize], own: f64, classes: usize) -> Vec<f32> {
    let mut targets = vec![0.0; labels.len() * classes];
    let before = labels.iter().cycle().skip(labels.len().saturating_sub(1));
    for ((row, &label), &other) in targets.chunks_exact_mut(classes).zip(labels).zip(before) {
        row[other] += (1.0 - own) as f32;
        row[label] += own as f32;
    }
    targets
}

/// Cross entropy as PyTorch defines it, averaged over the batch.
#[derive(Clone, Debug, Default)]
pub struct CrossEntropy {
    /// Share of the target that is spread over all classes.
    pub label_smoothing: f64,
    /// A weight for each class.
    pub class_weights: Option<Vec<f32>>,
}

impl CrossEntropy {
    /// The loss, and its gradient at the logits `[N, classes]`.
    ///
    /// # Errors
    /// Where targets and logits disagree in number.
    pub fn loss(&self, logits: &Tensor, targets: Targets) -> Result<(f64, Tensor)> {
        let (count, classes) = logits.dims2()?;
        let weights = self.weights(count, classes, targets)?;
        let weights = Tensor::from_vec(weights, (count, classes), &Device::Cpu)?;
        let weights = weights.to_device(logits.device())?;
        let logits = Var::from_tensor(&logits.detach())?;
        let loss = (log_softmax(&logits, D::Minus1)? * weights)?.sum_all()?;
        let value = loss.to_scalar::<f32>()?;
        match loss.backward()?.remove(&logits) {
            Some(gradient) => Ok((f64::from(value), gradient.detach())),
            None => bail!("the loss does not depend on the logits"),
        }
    }

    /// What a batch counts in a mean over several: the weights of its classes, or its images.
    pub fn share(&self, targets: Targets, images: usize) -> f64 {
        match (targets, &self.class_weights) {
            (Targets::Classes(labels), Some(weights)) => {
                let weight = |&label: &usize| weights.get(label).map_or(1.0, |&w| f64::from(w));
                labels.iter().map(weight).sum()
            }
            _ => images as f64,
        }
    }

    /// What the log-probabilities are multiplied with, so that their sum is the loss.
    fn weights(&self, count: usize, classes: usize, targets: Targets) -> Result<Vec<f32>> {
        let class_weight = |class: usize| match &self.class_weights {
            Some(weights) => weights.get(class).map_or(1.0, |&w| f64::from(w)),
            None => 1.0,
        };
        let mut all = vec![0.0; count * classes];
        // Classes are averaged by their weights, distributions by their number, as in PyTorch.
        let total = match targets {
            Targets::Classes(labels) => {
                if labels.len() != count || labels.iter().any(|&l| l >= classes) {
                    bail!("{} labels for {count} x {classes} logits", labels.len());
                }
                for (row, &label) in all.chunks_exact_mut(classes).zip(labels) {
                    row[label] = 1.0;
                }
                labels.iter().map(|&label| class_weight(label)).sum()
            }
            Targets::Distributions(values) => {
                if values.len() != all.len() {
                    bail!("{} targets for {count} x {classes} logits", values.len());
                }
                for (value, &target) in all.iter_mut().zip(values) {
                    *value = f64::from(target);
                }
                count as f64
            }
        };
        let (keep, spread) = (
            1.0 - self.label_smoothing,
            self.label_smoothing / classes as f64,
        );
        let weight = |(index, target): (usize, f64)| {
            (-class_weight(index % classes) * (keep * target + spread) / total) as f32
        };
        Ok(all.into_iter().enumerate().map(weight).collect())
    }
}
