//! Whether probabilities can be believed, and the temperature that makes them more so.

/// Bins that [0, 1] is divided into.
const BINS: usize = 15;

/// How often images are named rightly, by the probability with which they were named (Guo and
/// others, "On Calibration of Modern Neural Networks", 2017).
#[derive(Clone, Debug, PartialEq)]
pub struct Reliability(Vec<Bin>);

/// Images whose named class has a probability in (i / 15, (i + 1) / 15].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bin {
    pub images: u64,
    pub right: u64,
    /// Sum of the probabilities.
    pub probability: f64,
}

impl Default for Reliability {
    fn default() -> Self {
        Self(vec![Bin::default(); BINS])
    }
}

impl Reliability {
    /// Counts an image that was named with that probability.
    pub fn add(&mut self, probability: f64, right: bool) {
        // What is no number falls into the first bin, and spoils its sum.
        let index = (probability * BINS as f64).ceil() as usize;
        let bin = &mut self.0[index.clamp(1, BINS) - 1];
        bin.images += 1;
        bin.right += u64::from(right);
        bin.probability += probability;
    }

    /// The bins from 0 to 1, of equal width.
    pub fn bins(&self) -> &[Bin] {
        &self.0
    }

    /// Expected calibration error, in [0, 1]: how far the share that was named rightly is from
    /// the mean probability, over the bins, each counted with its images.
    pub fn error(&self) -> f64 {
        let images: u64 = self.0.iter().map(|bin| bin.images).sum();
        let gaps = self
            .0
            .iter()
            .map(|b| (b.right as f64 - b.probability).abs());
        gaps.sum::<f64>() / images.max(1) as f64
    }
}

/// Temperatures that are looked at.
const COLDEST: f64 = 0.01;
const HOTTEST: f64 = 100.0;

/// The temperature that minimises the mean cross entropy of softmax(logits / temperature), for
/// logits `[N, classes]` and the true classes. None where there is no minimum between 0.01 and
/// 100: every image is named rightly, so that colder is always better, or the logits know nothing.
pub fn best_temperature(logits: &[f32], labels: &[usize]) -> Option<f64> {
    let classes = logits.len().checked_div(labels.len())?;
    // The loss is convex in 1 / temperature: Newton's method, kept between bounds that close in.
    let (mut low, mut high) = (HOTTEST.recip(), COLDEST.recip());
    let slope = |inverse| derivatives(logits, labels, classes, inverse);
    if !(slope(low).0 < 0.0 && slope(high).0 > 0.0) {
        return None;
    }
    let mut inverse = 1.0;
    for _ in 0..200 {
        let (first, second) = slope(inverse);
        if first < 0.0 {
            low = inverse;
        } else {
            high = inverse;
        }
        let mut next = inverse - first / second;
        if !(low < next && next < high) {
            next = (low * high).sqrt();
        }
        let step = (next - inverse).abs();
        inverse = next;
        if step <= 1e-12 * inverse {
            break;
        }
    }
    Some(inverse.recip())
}

/// First and second derivative of the loss with respect to the inverse temperature: the mean
/// difference between the expected logit and that of the true class, and the mean variance.
fn derivatives(logits: &[f32], labels: &[usize], classes: usize, inverse: f64) -> (f64, f64) {
    let (mut first, mut second) = (0.0, 0.0);
    for (logits, &label) in logits.chunks_exact(classes.max(1)).zip(labels) {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let (mut sum, mut mean, mut square) = (0.0, 0.0, 0.0);
        for &logit in logits {
            let below = f64::from(logit - top);
            let weight = (below * inverse).exp();
            sum += weight;
            mean += weight * below;
            square += weight * below * below;
        }
        mean /= sum;
        first += mean - f64::from(logits[label] - top);
        second += square / sum - mean * mean;
    }
    let images = labels.len() as f64;
    (first / images, second / images)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_open_below_and_closed_above() {
        let mut reliability = Reliability::default();
        for (probability, right) in [(0.0, false), (0.2, true), (0.21, true), (1.0, false)] {
            reliability.add(probability, right);
        }
        let filled = reliability.bins().iter().enumerate();
        let filled: Vec<(usize, u64)> = filled
            .filter(|(_, bin)| bin.images > 0)
            .map(|(i, bin)| (i, bin.images))
            .collect();
        assert_eq!(filled, [(0, 1), (2, 1), (3, 1), (14, 1)]);
        let expected = (0.0 + 0.8 + 0.79 + 1.0) / 4.0;
        assert!((reliability.error() - expected).abs() < 1e-12);
        assert_eq!(Reliability::default().error(), 0.0);
    }

    #[test]
    fn two_classes_have_their_temperature_in_closed_form() {
        // Logits apart by 3, three of four right: ln 3 apart is right.
        let logits = [3.0, 0.0].repeat(4);
        let found = best_temperature(&logits, &[0, 0, 1, 0]).unwrap();
        assert!((found - 3.0 / 3f64.ln()).abs() < 1e-9, "{found}");
    }

    #[test]
    fn where_colder_is_always_better_there_is_none() {
        assert_eq!(best_temperature(&[3.0, 0.0, 0.0, 1.0], &[0, 1]), None);
        // Wrong more often than right.
        let logits = [3.0, 0.0].repeat(3);
        assert_eq!(best_temperature(&logits, &[0, 1, 1]), None);
        assert_eq!(best_temperature(&[], &[]), None);
        assert_eq!(best_temperature(&[f32::NAN, 1.0], &[0]), None);
    }
}
