//! The head that suits a frozen network best: multinomial logistic regression on its features.
//!
//! Features are standardised, the loss is the run's own (class weights and label smoothing
//! included) plus half the weights' square times a strength, and L-BFGS goes to the minimum. The
//! strength is the one of a few that does best in cross-validation, stratified by class, all views
//! of an image on the same side. In the end the standardisation becomes part of weight and bias.
//!
//! Sums run over chunks that follow from the number of images alone: the same bits with any number
//! of threads.

use rand_chacha::ChaCha8Rng;

use super::lbfgs::{Until, minimize};
use super::loss::CrossEntropy;
use super::slices::Workers;
use crate::data::{Purpose, generator, shuffle};
use crate::kernels::gemm::Packed;
use crate::kernels::matrix::Matrix;

/// Strengths that are tried, the strongest first: each fit begins where the one before ended.
const STRENGTHS: [f64; 9] = [1.0, 0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4];
/// Strengths that may be worse than the best so far before the others are left out.
const WORSE: usize = 2;
const FOLDS: usize = 5;
/// Multiply-adds of one product of all samples with the weights, up to which all folds are tried,
/// and up to which one of them is; beyond, the strength is [`untried_strength`].
const ALL_FOLDS: usize = 400 << 20;
const ONE_FOLD: usize = 4 << 30;

/// Enough to compare strengths.
const ROUGH: Until = Until {
    gradient: 1e-4,
    decrease: 1e-5,
    iterations: 200,
};
/// Where more iterations would change nothing that can be seen.
const FINE: Until = Until {
    gradient: 2e-5,
    decrease: 1e-7,
    iterations: 1000,
};

/// What a head is fitted to.
pub(super) struct Examples<'a> {
    /// Views of the images, `[N, F]` each, the images in the same order.
    pub views: Vec<&'a [f32]>,
    /// The images' classes.
    pub labels: &'a [usize],
    pub classes: usize,
}

/// A fitted head.
pub(super) struct Head {
    /// `[classes, F]`
    pub weight: Vec<f32>,
    pub bias: Vec<f32>,
    pub report: HeadReport,
}

/// How a head was fitted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadReport {
    /// Images, and views of each.
    pub images: usize,
    pub views: usize,
    /// Half of the weights' square counts so much beside the mean loss.
    pub strength: f64,
    /// Folds of the cross-validation that chose it; none where there was too little data, or too
    /// much.
    pub folds: usize,
    /// Accuracy on the images left out of the folds' fits.
    pub held_out_accuracy: f64,
    pub iterations: usize,
    /// On all the views that it was fitted to.
    pub loss: f64,
    pub accuracy: f64,
}

/// Fits a head; None where `go_on` said no.
pub(super) fn fit(
    examples: &Examples,
    loss: &CrossEntropy,
    seed: u64,
    workers: &Workers,
    go_on: &dyn Fn() -> bool,
) -> Option<Head> {
    let mut problem = Problem::new(examples, loss, seed, workers);
    let width = problem.scaling.mean.len();
    let parameters = examples.classes * (width + 1);
    let (strength, folds, held_out_accuracy, start) = problem.choose(parameters, go_on)?;
    let mut x = start;
    let iterations = problem.minimize(&mut x, strength, None, FINE, go_on)?;
    let all = problem.measure(&x, None);
    let images = examples.labels.len();
    let report = HeadReport {
        images,
        views: examples.views.len(),
        strength,
        folds,
        held_out_accuracy,
        iterations,
        loss: all.loss / all.rows as f64,
        accuracy: all.correct as f64 / all.rows as f64,
    };
    let (weight, bias) = problem.scaling.fold_into(&x, examples.classes);
    Some(Head {
        weight,
        bias,
        report,
    })
}

/// Strength where none is tried: as much as one image, as scikit-learn's default is.
fn untried_strength(images: usize) -> f64 {
    (1.0 / images as f64).clamp(1e-5, 1.0)
}

/// Standardisation: `(value - mean) · scale`.
struct Scaling {
    mean: Vec<f64>,
    scale: Vec<f64>,
}

impl Scaling {
    fn of(views: &[&[f32]], width: usize) -> Self {
        let rows = || views.iter().flat_map(|view| view.chunks_exact(width));
        let count = rows().count().max(1) as f64;
        let mut mean = vec![0.0; width];
        for row in rows() {
            mean.iter_mut()
                .zip(row)
                .for_each(|(m, &v)| *m += f64::from(v));
        }
        mean.iter_mut().for_each(|m| *m /= count);
        let mut scale = vec![0.0; width];
        for row in rows() {
            for ((square, &mean), &value) in scale.iter_mut().zip(&mean).zip(row) {
                *square += (f64::from(value) - mean).powi(2);
            }
        }
        for scale in &mut scale {
            let deviation = (*scale / count).sqrt();
            // What is always the same tells nothing.
            *scale = if deviation > 1e-12 {
                1.0 / deviation
            } else {
                0.0
            };
        }
        Self { mean, scale }
    }

    /// Weight `[classes, F]` and bias for features as they are.
    fn fold_into(&self, x: &[f64], classes: usize) -> (Vec<f32>, Vec<f32>) {
        let width = self.mean.len();
        let (weights, biases) = x.split_at(classes * width);
        let mut weight = Vec::with_capacity(weights.len());
        let mut bias = Vec::with_capacity(classes);
        for (row, b) in weights.chunks_exact(width).zip(biases) {
            let mut b = *b;
            for ((w, mean), scale) in row.iter().zip(&self.mean).zip(&self.scale) {
                weight.push((w * scale) as f32);
                b -= w * scale * mean;
            }
            bias.push(b as f32);
        }
        (weight, bias)
    }
}

/// Some of the samples, and what a pass over them gives.
struct Chunk {
    samples: Matrix,
    labels: Vec<usize>,
    folds: Vec<usize>,
    logits: Vec<f32>,
    /// The loss's gradient at the logits.
    residuals: Matrix,
    /// `[classes, padded width]`
    gradient: Vec<f32>,
    bias_gradient: Vec<f64>,
    inside: Sums,
    held_out: Sums,
}

/// Over samples.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// As it is minimised.
    objective: f64,
    /// Plain cross entropy.
    loss: f64,
    correct: usize,
    rows: usize,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.objective += other.objective;
        self.loss += other.loss;
        self.correct += other.correct;
        self.rows += other.rows;
    }
}

struct Problem<'a> {
    classes: usize,
    scaling: Scaling,
    chunks: Vec<Chunk>,
    /// By class: what the log-probabilities are multiplied with, and the sum of that.
    targets: Vec<(Vec<f64>, f64)>,
    /// Weights of the samples together: outside of each fold, and of all.
    totals: Vec<f64>,
    /// Folds, where it makes sense to divide the images.
    folds: usize,
    images: usize,
    weights: Packed,
    workers: &'a Workers,
}

impl<'a> Problem<'a> {
    fn new(examples: &Examples, loss: &CrossEntropy, seed: u64, workers: &'a Workers) -> Self {
        let &Examples {
            ref views,
            labels,
            classes,
        } = examples;
        let images = labels.len();
        let width = views[0].len() / images;
        let scaling = Scaling::of(views, width);
        let (fold_of, folds) = stratified(labels, classes, seed);
        let class_weight = |class: usize| match &loss.class_weights {
            Some(weights) => f64::from(weights[class]),
            None => 1.0,
        };
        let spread = loss.label_smoothing / classes as f64;
        let target = |label: usize| {
            let weight = |class: usize| {
                let own = if class == label { 1.0 } else { 0.0 };
                class_weight(class) * ((1.0 - loss.label_smoothing) * own + spread)
            };
            let weights: Vec<f64> = (0..classes).map(weight).collect();
            let sum = weights.iter().sum();
            (weights, sum)
        };
        let outside = |fold: usize| {
            let rows = labels.iter().zip(&fold_of);
            let rows = rows.filter(|&(_, &f)| fold == folds || f != fold);
            rows.map(|(&l, _)| class_weight(l)).sum::<f64>() * views.len() as f64
        };
        let totals = (0..=folds).map(outside).collect();
        let rows = images * views.len();
        let count = (rows / 64).clamp(1, 16);
        let mut row = vec![0.0; width];
        let chunk = |index: usize| {
            let range = index * rows / count..(index + 1) * rows / count;
            let mut samples = Matrix::zeros(workers.isa, range.len(), width);
            for (place, r) in range.clone().enumerate() {
                let values = &views[r / images][r % images * width..][..width];
                let scaled = values.iter().zip(&scaling.mean).zip(&scaling.scale);
                for (to, ((&v, mean), scale)) in row.iter_mut().zip(scaled) {
                    *to = ((f64::from(v) - mean) * scale) as f32;
                }
                samples.set_row(place, &row);
            }
            Chunk {
                logits: vec![0.0; range.len() * classes],
                residuals: Matrix::zeros(workers.isa, range.len(), classes),
                gradient: vec![0.0; classes * samples.padded_columns()],
                bias_gradient: vec![0.0; classes],
                labels: range.clone().map(|r| labels[r % images]).collect(),
                folds: range.map(|r| fold_of[r % images]).collect(),
                samples,
                inside: Sums::default(),
                held_out: Sums::default(),
            }
        };
        let chunks: Vec<Chunk> = (0..count).map(chunk).collect();
        let depth = chunks[0].samples.padded_columns();
        Self {
            classes,
            scaling,
            targets: (0..classes).map(target).collect(),
            totals,
            folds,
            images,
            weights: Packed::new(workers.isa, depth, classes, |_, _| 0.0),
            chunks,
            workers,
        }
    }

    /// The strength that does best, the folds tried, the accuracy there on what was held out, and
    /// where to begin with all images.
    fn choose(
        &mut self,
        parameters: usize,
        go_on: &dyn Fn() -> bool,
    ) -> Option<(f64, usize, f64, Vec<f64>)> {
        let rows: usize = self.chunks.iter().map(|c| c.samples.rows()).sum();
        let folds = match rows * parameters {
            _ if self.folds == 0 => 0,
            work if work <= ALL_FOLDS => self.folds,
            work if work <= ONE_FOLD => 1,
            _ => 0,
        };
        let mut current = vec![vec![0.0; parameters]; folds];
        let mut best: Option<(f64, f64, Sums, Vec<f64>)> = None;
        let mut worse = 0;
        for strength in STRENGTHS {
            if folds == 0 || worse == WORSE {
                break;
            }
            let mut held_out = Sums::default();
            for (fold, x) in current.iter_mut().enumerate() {
                self.minimize(x, strength, Some(fold), ROUGH, go_on)?;
                held_out.add(&self.measure(x, Some(fold)));
            }
            let loss = held_out.loss / held_out.rows.max(1) as f64;
            if best.as_ref().is_none_or(|b| loss < b.1) {
                let mut mean = vec![0.0; parameters];
                for x in &current {
                    let share = 1.0 / folds as f64;
                    mean.iter_mut().zip(x).for_each(|(m, x)| *m += share * x);
                }
                best = Some((strength, loss, held_out, mean));
                worse = 0;
            } else {
                worse += 1;
            }
        }
        Some(match best {
            Some((strength, _, sums, start)) => {
                let accuracy = sums.correct as f64 / sums.rows.max(1) as f64;
                (strength, folds, accuracy, start)
            }
            None => {
                let strength = untried_strength(self.images);
                (strength, 0, 0.0, vec![0.0; parameters])
            }
        })
    }

    /// Moves `x` to the minimum on what is outside of a fold.
    fn minimize(
        &mut self,
        x: &mut Vec<f64>,
        strength: f64,
        fold: Option<usize>,
        until: Until,
        go_on: &dyn Fn() -> bool,
    ) -> Option<usize> {
        minimize(x, until, |x, gradient| {
            go_on().then(|| self.evaluate(x, strength, fold, gradient))
        })
    }

    fn evaluate(
        &mut self,
        x: &[f64],
        strength: f64,
        fold: Option<usize>,
        gradient: &mut [f64],
    ) -> f64 {
        let total = self.totals[fold.unwrap_or(self.folds)];
        self.pass(x, fold, 1.0 / total);
        let weights = self.classes * self.scaling.mean.len();
        let width = self.scaling.mean.len();
        let padded = self.chunks[0].samples.padded_columns();
        let (to, biases) = gradient.split_at_mut(weights);
        let chunks = &self.chunks;
        let rows: Vec<_> = to
            .chunks_exact_mut(width)
            .zip(x.chunks_exact(width))
            .enumerate()
            .collect();
        self.workers.each(rows, |(class, (to, x))| {
            to.iter_mut().zip(x).for_each(|(to, x)| *to = strength * x);
            for chunk in chunks {
                let from = &chunk.gradient[class * padded..][..width];
                to.iter_mut()
                    .zip(from)
                    .for_each(|(to, &g)| *to += f64::from(g));
            }
        });
        for (class, bias) in biases.iter_mut().enumerate() {
            *bias = chunks.iter().map(|c| c.bias_gradient[class]).sum();
        }
        let loss: f64 = chunks.iter().map(|c| c.inside.objective).sum();
        loss / total + 0.5 * strength * super::lbfgs::dot(&x[..weights], &x[..weights])
    }

    /// What `x` does on a fold, or on all samples.
    fn measure(&mut self, x: &[f64], fold: Option<usize>) -> Sums {
        self.pass(x, fold, 0.0);
        let mut sums = Sums::default();
        for chunk in &self.chunks {
            sums.add(match fold {
                Some(_) => &chunk.held_out,
                None => &chunk.inside,
            });
        }
        sums
    }

    /// Goes over all samples: sums, and the gradients of what is outside of the fold, times
    /// `scale`.
    fn pass(&mut self, x: &[f64], fold: Option<usize>, scale: f64) {
        let width = self.scaling.mean.len();
        let (weights, biases) = x.split_at(self.classes * width);
        self.weights.refill(|row, class| match row < width {
            true => weights[class * width + row] as f32,
            false => 0.0,
        });
        let (packed, targets) = (&self.weights, &self.targets);
        let chunks: Vec<&mut Chunk> = self.chunks.iter_mut().collect();
        self.workers.each(chunks, |chunk| {
            chunk.pass(packed, biases, targets, fold, scale);
        });
    }
}

impl Chunk {
    fn pass(
        &mut self,
        weights: &Packed,
        biases: &[f64],
        targets: &[(Vec<f64>, f64)],
        fold: Option<usize>,
        scale: f64,
    ) {
        let classes = biases.len();
        self.samples.times(weights, &mut self.logits);
        self.bias_gradient.fill(0.0);
        (self.inside, self.held_out) = Default::default();
        let mut residual = vec![0.0f32; classes];
        for (row, logits) in self.logits.chunks_exact_mut(classes).enumerate() {
            let label = self.labels[row];
            for (logit, bias) in logits.iter_mut().zip(biases) {
                *logit += *bias as f32;
            }
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0.0;
            for (p, logit) in residual.iter_mut().zip(&*logits) {
                *p = (logit - top).exp();
                sum += f64::from(*p);
            }
            let log_sum = sum.ln();
            let held_out = fold == Some(self.folds[row]);
            let sums = match held_out {
                true => &mut self.held_out,
                false => &mut self.inside,
            };
            let (target, weight) = &targets[label];
            let entropy = target
                .iter()
                .zip(&*logits)
                .map(|(t, z)| t * (log_sum - f64::from(z - top)));
            sums.objective += entropy.sum::<f64>();
            sums.loss += log_sum - f64::from(logits[label] - top);
            let others = logits
                .iter()
                .enumerate()
                .filter(|&(class, _)| class != label);
            sums.correct += usize::from(others.into_iter().all(|(_, &z)| z < logits[label]));
            sums.rows += 1;
            if held_out {
                residual.fill(0.0);
            } else {
                let share = weight / sum;
                for ((r, t), bias) in residual.iter_mut().zip(target).zip(&mut self.bias_gradient) {
                    let g = scale * (f64::from(*r) * share - t);
                    *bias += g;
                    *r = g as f32;
                }
            }
            self.residuals.set_row(row, &residual);
        }
        if scale != 0.0 {
            self.samples
                .transposed_times(&self.residuals, &mut self.gradient);
        }
    }
}

/// A fold for each image, its class's images spread over all of them, and how many folds there
/// are: none where no class has images for two.
fn stratified(labels: &[usize], classes: usize, seed: u64) -> (Vec<usize>, usize) {
    let mut by_class = vec![Vec::new(); classes];
    for (image, &label) in labels.iter().enumerate() {
        by_class[label].push(image);
    }
    let most = by_class.iter().map(Vec::len).max().unwrap_or(0);
    let folds = match most {
        0 | 1 => 0,
        most => most.min(FOLDS),
    };
    let mut rng: ChaCha8Rng = generator(seed, Purpose::Folds, 0, 0);
    let mut fold_of = vec![0; labels.len()];
    let mut next = 0;
    for members in &mut by_class {
        shuffle(members, &mut rng);
        for &image in &*members {
            fold_of[image] = next % folds.max(1);
            next += 1;
        }
    }
    (fold_of, folds)
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Clouds around a centre for each class, whose features differ in scale and place.
    fn clouds(images: usize, width: usize, classes: usize) -> (Vec<f32>, Vec<usize>) {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut features = Vec::new();
        let labels: Vec<usize> = (0..images).map(|i| i % classes).collect();
        for label in &labels {
            for f in 0..width {
                let centre = if f % classes == *label { 1.0 } else { 0.0 };
                let noise: f32 = rng.random_range(-1.5..1.5);
                features.push((centre + noise) * (1 + f % 7) as f32 + f as f32);
            }
        }
        // One tells nothing.
        features
            .chunks_exact_mut(width)
            .for_each(|row| row[3] = 2.5);
        (features, labels)
    }

    fn fit_clouds(loss: &CrossEntropy, threads: usize) -> Head {
        let (features, labels) = clouds(90, 37, 3);
        let examples = Examples {
            views: vec![&features],
            labels: &labels,
            classes: 3,
        };
        let workers = Workers::new(threads).unwrap();
        fit(&examples, loss, 5, &workers, &|| true).unwrap()
    }

    /// Loss and its gradient in float64, at the head in terms of standardised features.
    fn largest_gradient(loss: &CrossEntropy, head: &Head) -> f64 {
        let (features, labels) = clouds(90, 37, 3);
        let scaling = Scaling::of(&[&features], 37);
        let weights = loss.class_weights.clone().unwrap_or(vec![1.0; 3]);
        let total: f64 = labels.iter().map(|&l| f64::from(weights[l])).sum();
        let mut gradient = vec![0.0; 3 * 37];
        let mut bias_gradient = [0.0; 3];
        for (row, &label) in features.chunks_exact(37).zip(&labels) {
            let logit = |c: usize| -> f64 {
                let w = &head.weight[c * 37..][..37];
                let products = row
                    .iter()
                    .zip(w)
                    .map(|(&x, &w)| f64::from(x) * f64::from(w));
                f64::from(head.bias[c]) + products.sum::<f64>()
            };
            let exp = [0, 1, 2].map(|c| logit(c).exp());
            let sum: f64 = exp.iter().sum();
            let target = [0, 1, 2].map(|c| {
                let own = if c == label {
                    1.0 - loss.label_smoothing
                } else {
                    0.0
                };
                f64::from(weights[c]) * (own + loss.label_smoothing / 3.0)
            });
            let all: f64 = target.iter().sum();
            for c in 0..3 {
                let g = (all * exp[c] / sum - target[c]) / total;
                bias_gradient[c] += g;
                for f in 0..37 {
                    let x = (f64::from(row[f]) - scaling.mean[f]) * scaling.scale[f];
                    gradient[c * 37 + f] += g * x;
                }
            }
        }
        for (c, row) in gradient.chunks_exact_mut(37).enumerate() {
            for (f, g) in row.iter_mut().enumerate() {
                if scaling.scale[f] > 0.0 {
                    *g += head.report.strength * f64::from(head.weight[c * 37 + f])
                        / scaling.scale[f];
                }
            }
        }
        let all = gradient.iter().chain(&bias_gradient);
        all.fold(0.0, |most, g| g.abs().max(most))
    }

    #[test]
    fn the_head_is_at_the_minimum() {
        let weighted = CrossEntropy {
            label_smoothing: 0.1,
            class_weights: Some(vec![0.5, 2.0, 1.0]),
        };
        for loss in [CrossEntropy::default(), weighted] {
            let head = fit_clouds(&loss, 2);
            let gradient = largest_gradient(&loss, &head);
            assert!(gradient < 1e-4, "{gradient}");
            assert_eq!(head.report.folds, FOLDS);
            assert!(head.report.held_out_accuracy > 0.6, "{:?}", head.report);
            assert!(head.weight.iter().skip(3).step_by(37).all(|&w| w == 0.0));
        }
    }

    #[test]
    fn the_same_bits_with_any_number_of_threads() {
        let one = fit_clouds(&CrossEntropy::default(), 1);
        let three = fit_clouds(&CrossEntropy::default(), 3);
        assert!(one.weight == three.weight && one.bias == three.bias);
        assert_eq!(one.report, three.report);
    }

    #[test]
    fn folds_are_stratified() {
        let labels: Vec<usize> = (0..53).map(|i| if i < 40 { 0 } else { 1 }).collect();
        let (fold_of, folds) = stratified(&labels, 2, 1);
        assert_eq!(folds, 5);
        for fold in 0..5 {
            let of = |class: usize| {
                let members = labels.iter().zip(&fold_of);
                members.filter(|&(&l, &f)| l == class && f == fold).count()
            };
            assert_eq!(of(0), 8);
            assert!((2..=3).contains(&of(1)));
        }
        assert_eq!(stratified(&[0, 1, 2], 3, 1).1, 0);
        assert_eq!(stratified(&[0, 1, 0], 2, 1).1, 2);
    }

    #[test]
    fn one_image_a_class_is_enough() {
        let examples = Examples {
            views: vec![&[1.0, 0.0, 0.0, 1.0]],
            labels: &[0, 1],
            classes: 3,
        };
        let workers = Workers::new(1).unwrap();
        let head = fit(&examples, &CrossEntropy::default(), 0, &workers, &|| true).unwrap();
        assert_eq!((head.report.folds, head.report.accuracy), (0, 1.0));
        assert!(head.weight.iter().chain(&head.bias).all(|v| v.is_finite()));
        assert!(fit(&examples, &CrossEntropy::default(), 0, &workers, &|| false).is_none());
    }
}
