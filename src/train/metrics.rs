use serde::Serialize;

/// How well logits name the classes of images; filled batch by batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    classes: usize,
    images: u64,
    loss: f64,
    top1: u64,
    top5: u64,
    /// `[true class][named class]`, row after row.
    confusion: Vec<u64>,
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
    pub fn new(classes: usize) -> Self {
        Self {
            classes,
            images: 0,
            loss: 0.0,
            top1: 0,
            top5: 0,
            confusion: vec![0; classes * classes],
        }
    }

    /// Counts a batch: logits `[N, classes]`, row after row, and the true classes.
    pub fn add(&mut self, logits: &[f32], labels: &[usize]) {
        for (logits, &label) in logits.chunks_exact(self.classes).zip(labels) {
            let own = logits[label];
            // In float64, so that the order of batches hardly matters.
            let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&l| f64::from(l - top).exp()).sum();
            self.loss += sum.ln() - f64::from(own - top);
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
            self.confusion[label * self.classes + named] += 1;
            self.images += 1;
        }
    }

    pub fn images(&self) -> u64 {
        self.images
    }

    /// Mean cross entropy in nats.
    pub fn loss(&self) -> f64 {
        self.loss / self.images.max(1) as f64
    }

    /// Share of images whose class has the highest logit.
    pub fn accuracy(&self) -> f64 {
        ratio(self.top1, self.images)
    }

    /// Share of images whose class is among the five highest logits.
    pub fn top5(&self) -> f64 {
        ratio(self.top5, self.images)
    }

    /// How many images of each class (rows) were given each name (columns).
    pub fn confusion(&self) -> impl Iterator<Item = &[u64]> {
        self.confusion.chunks_exact(self.classes.max(1))
    }

    /// Every class, in order.
    pub fn classes(&self) -> Vec<ClassMetrics> {
        let rows: Vec<u64> = self.confusion().map(|row| row.iter().sum()).collect();
        let columns = (0..self.classes).map(|c| self.confusion().map(|row| row[c]).sum::<u64>());
        columns
            .zip(&rows)
            .enumerate()
            .map(|(class, (named, &support))| {
                let right = self.confusion[class * self.classes + class];
                let others = self.images - support;
                ClassMetrics {
                    precision: ratio(right, named),
                    recall: ratio(right, support),
                    specificity: ratio(others - (named - right), others),
                    // 2pr / (p + r), in counts.
                    f1: ratio(2 * right, named + support),
                    support,
                }
            })
            .collect()
    }

    /// Mean F1 of the classes that are there or were named.
    pub fn macro_f1(&self) -> f64 {
        let all = self.classes();
        let columns = (0..self.classes).map(|c| self.confusion().map(|row| row[c]).sum::<u64>());
        let met = all.iter().zip(columns);
        let met: Vec<f64> = met
            .filter(|(class, named)| class.support + named > 0)
            .map(|(class, _)| class.f1)
            .collect();
        met.iter().sum::<f64>() / met.len().max(1) as f64
    }
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
        let mut evaluation = Evaluation::new(3);
        for (label, named) in pairs {
            evaluation.add(&naming(named), &[label]);
        }
        assert_eq!(evaluation.images(), 7);
        assert!((evaluation.accuracy() - 4.0 / 7.0).abs() < 1e-12);
        assert_eq!(evaluation.top5(), 1.0);
        let rows: Vec<&[u64]> = evaluation.confusion().collect();
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
    }

    #[test]
    fn a_class_that_is_neither_there_nor_named_does_not_count() {
        let mut evaluation = Evaluation::new(3);
        evaluation.add(&naming(0), &[0]);
        assert_eq!(evaluation.macro_f1(), 1.0);
        // Equal logits name the first class.
        evaluation.add(&[0.0; 3], &[1]);
        assert_eq!(evaluation.accuracy(), 0.5);
        evaluation.add(&[f32::NAN; 3], &[0]);
        assert_eq!(evaluation.accuracy(), 1.0 / 3.0);
        assert!(evaluation.loss().is_nan());
    }
}
