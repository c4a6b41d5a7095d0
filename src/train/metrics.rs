use std::collections::BTreeMap;

use serde::Serialize;

use super::calibration::Reliability;

/// How well logits name the classes of images; filled batch by batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    classes: usize,
    temperature: f64,
    loss: f64,
    top1: u64,
    top5: u64,
    reliability: Reliability,
    verdicts: Vec<Verdict>,
}

/// What was said of one image.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// Position of the image among the samples.
    pub sample: u32,
    /// The true class, and the named one.
    pub label: u32,
    pub named: u32,
    /// Of the true class, and of the named one.
    pub label_probability: f32,
    pub named_probability: f32,
}

impl Verdict {
    pub fn is_right(&self) -> bool {
        self.label == self.named
    }
}

/// One class among the others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ClassMetrics {
    /// Of the images that were given this name, those that deserve it; 0 where there are none.
    pub precision: f64,
    /// Of the images of this class, those that were named so; 0 where there are none.
    pub recall: f64,
    /// Of the images of other classes, those that were not named so.
    pub specificity: f64,
    /// Harmonic mean of precision and recall.
    pub f1: f64,
    /// Images of this class.
    pub support: u64,
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

impl Evaluation {
    /// Probabilities will be those of logits divided by `temperature`.
    pub fn new(classes: usize, temperature: f64) -> Self {
        Self {
            classes,
            temperature,
            loss: 0.0,
            top1: 0,
            top5: 0,
            reliability: Reliability::default(),
            verdicts: Vec::new(),
        }
    }

    /// Counts a batch: logits `[N, classes]`, row after row, the true classes, and the positions
    /// of the images among the samples.
    pub fn add(&mut self, logits: &[f32], labels: &[usize], samples: &[usize]) {
        let rows = logits.chunks_exact(self.classes);
        for ((logits, &label), &sample) in rows.zip(labels).zip(samples) {
            let own = logits[label];
            // In float64, so that the order of batches hardly matters.
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let below = |logit: f32| f64::from(logit - top) / self.temperature;
            let sum: f64 = logits.iter().map(|&l| below(l).exp()).sum();
            let loss = sum.ln() - below(own);
            self.loss += loss;
            // The first of equal logits counts as the higher one; what is no number comes last.
            let better = |(class, logit): (usize, &f32)| {
                *logit > own || (*logit == own && class < label) || own.is_nan()
            };
            let above = logits.iter().enumerate().filter(|&l| better(l)).count();
            self.top1 += u64::from(above == 0);
            self.top5 += u64::from(above < 5);
            let named = (0..self.classes).fold(0, |best, class| {
                if logits[class] > logits[best] || logits[best].is_nan() {
                    class
                } else {
                    best
                }
            });
            self.reliability.add(1.0 / sum, named == label);
            self.verdicts.push(Verdict {
                sample: sample as u32,
                label: label as u32,
                named: named as u32,
                label_probability: (-loss).exp() as f32,
                named_probability: (1.0 / sum) as f32,
            });
        }
    }

    pub fn images(&self) -> u64 {
        self.verdicts.len() as u64
    }

    /// Mean cross entropy in nats.
    pub fn loss(&self) -> f64 {
        self.loss / self.images().max(1) as f64
    }

    /// Share of images whose class has the highest logit.
    pub fn accuracy(&self) -> f64 {
        ratio(self.top1, self.images())
    }

    /// Share of images whose class is among the five highest logits.
    pub fn top5(&self) -> f64 {
        ratio(self.top5, self.images())
    }

    pub fn reliability(&self) -> &Reliability {
        &self.reliability
    }

    /// What was said of each image, in the order in which they came.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.verdicts
    }

    /// What was said wrongly, the least expected truth first.
    pub fn mistakes(&self) -> Vec<Verdict> {
        let wrong = self.verdicts.iter().filter(|v| !v.is_right());
        let mut wrong: Vec<Verdict> = wrong.copied().collect();
        wrong.sort_by(|a, b| a.label_probability.total_cmp(&b.label_probability));
        wrong
    }

    /// How many images of a class (first) were given a name (second), where there are any.
    pub fn named(&self) -> BTreeMap<(usize, usize), u64> {
        let mut counts = BTreeMap::new();
        for verdict in &self.verdicts {
            *counts
                .entry((verdict.label as usize, verdict.named as usize))
                .or_default() += 1;
        }
        counts
    }

    /// The confusion matrix: how many images of each class (rows) were given each name (columns).
    pub fn confusion(&self) -> impl Iterator<Item = Vec<u64>> {
        let counts = self.named();
        let classes = self.classes;
        (0..classes).map(move |class| {
            let mut row = vec![0; classes];
            for ((_, named), &count) in counts.range((class, 0)..=(class, classes)) {
                row[*named] = count;
            }
            row
        })
    }

    /// Every class, in order.
    pub fn classes(&self) -> Vec<ClassMetrics> {
        let images = self.images();
        let counts = self.counts();
        let metrics = counts.iter().map(|count| {
            let Counts {
                support,
                named,
                right,
            } = *count;
            let others = images - support;
            ClassMetrics {
                precision: ratio(right, named),
                recall: ratio(right, support),
                specificity: ratio(others - (named - right), others),
                // 2pr / (p + r), in counts.
                f1: ratio(2 * right, named + support),
                support,
            }
        });
        metrics.collect()
    }

    fn counts(&self) -> Vec<Counts> {
        let mut counts = vec![Counts::default(); self.classes];
        for verdict in &self.verdicts {
            let (label, named) = (verdict.label as usize, verdict.named as usize);
            counts[label].support += 1;
            counts[named].named += 1;
            counts[label].right += u64::from(label == named);
        }
        counts
    }

    /// Mean F1 of the classes that are there or were named.
    pub fn macro_f1(&self) -> f64 {
        let all = self.classes().into_iter().zip(self.counts());
        let met = all.filter(|(_, count)| count.support + count.named > 0);
        let met: Vec<f64> = met.map(|(class, _)| class.f1).collect();
        met.iter().sum::<f64>() / met.len().max(1) as f64
    }
}

/// Images of a class.
#[derive(Clone, Copy, Default)]
struct Counts {
    support: u64,
    /// Given its name.
    named: u64,
    /// Both.
    right: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits that name a class.
    fn naming(class: usize) -> [f32; 3] {
        let mut logits = [0.0; 3];
        logits[class] = 2.0;
        logits
    }

    #[test]
    fn metrics_are_those_of_the_confusion_matrix() {
        // As scikit-learn's classification_report has it for these pairs.
        let pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 1), (2, 1), (2, 0)];
        let mut evaluation = Evaluation::new(3, 1.0);
        for (label, named) in pairs {
            evaluation.add(&naming(named), &[label], &[0]);
        }
        assert_eq!(evaluation.images(), 7);
        assert!((evaluation.accuracy() - 4.0 / 7.0).abs() < 1e-12);
        assert_eq!(evaluation.top5(), 1.0);
        let rows: Vec<Vec<u64>> = evaluation.confusion().collect();
        assert_eq!(rows, [[2, 1, 0], [0, 2, 0], [1, 1, 0]]);
        let classes = evaluation.classes();
        let expected = [
            (2.0 / 3.0, 2.0 / 3.0, 0.75, 2.0 / 3.0, 3),
            (0.5, 1.0, 0.6, 2.0 / 3.0, 2),
            (0.0, 0.0, 1.0, 0.0, 2),
        ];
        for (class, (precision, recall, specificity, f1, support)) in classes.iter().zip(expected) {
            assert!((class.precision - precision).abs() < 1e-12);
            assert!((class.recall - recall).abs() < 1e-12);
            assert!((class.specificity - specificity).abs() < 1e-12);
            assert!((class.f1 - f1).abs() < 1e-12);
            assert_eq!(class.support, support);
        }
        assert!((evaluation.macro_f1() - 4.0 / 9.0).abs() < 1e-12);
        let right = 2f64.exp() / (2f64.exp() + 2.0);
        let wrong = 1.0 / (2f64.exp() + 2.0);
        let loss = -(4.0 * right.ln() + 3.0 * wrong.ln()) / 7.0;
        assert!((evaluation.loss() - loss).abs() < 1e-6);
        let wrong: Vec<(u32, u32)> = evaluation
            .mistakes()
            .iter()
            .map(|v| (v.label, v.named))
            .collect();
        assert_eq!(wrong, [(0, 1), (2, 1), (2, 0)]);
    }

    #[test]
    fn a_temperature_changes_probabilities_and_no_name() {
        let logits = [1.0, 3.0, 0.0, 2.5, 2.0, 0.0];
        let (mut cold, mut warm) = (Evaluation::new(3, 1.0), Evaluation::new(3, 4.0));
        cold.add(&logits, &[0, 0], &[5, 9]);
        warm.add(&logits.map(|l| l * 4.0), &[0, 0], &[5, 9]);
        assert_eq!(cold.loss(), warm.loss());
        assert_eq!(cold.verdicts(), warm.verdicts());
        let verdict = cold.verdicts()[0];
        let sum = 1f64.exp() + 3f64.exp() + 1.0;
        assert_eq!((verdict.sample, verdict.label, verdict.named), (5, 0, 1));
        assert!((f64::from(verdict.label_probability) - 1f64.exp() / sum).abs() < 1e-7);
        assert!((f64::from(verdict.named_probability) - 3f64.exp() / sum).abs() < 1e-7);
        assert_eq!(cold.mistakes(), [verdict]);
    }

    #[test]
    fn a_class_that_is_neither_there_nor_named_does_not_count() {
        let mut evaluation = Evaluation::new(3, 1.0);
        evaluation.add(&naming(0), &[0], &[0]);
        assert_eq!(evaluation.macro_f1(), 1.0);
        // Equal logits name the first class.
        evaluation.add(&[0.0; 3], &[1], &[1]);
        assert_eq!(evaluation.accuracy(), 0.5);
        evaluation.add(&[f32::NAN; 3], &[0], &[2]);
        assert_eq!(evaluation.accuracy(), 1.0 / 3.0);
        assert!(evaluation.loss().is_nan());
    }
}
