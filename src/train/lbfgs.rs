//! Minimising a smooth convex function: L-BFGS (Liu and Nocedal, 1989) with a backtracking line
//! search. Convexity makes every pair of steps usable, so that no second condition is needed.

/// Steps that are remembered.
const MEMORY: usize = 12;
/// Share of the promised decrease that a step must bring.
const SUFFICIENT: f64 = 1e-4;
/// Attempts at a step, each shorter than the one before.
const ATTEMPTS: usize = 20;

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Until {
    /// No part of the gradient is larger.
    pub gradient: f64,
    /// A step decreases the value by no more than this share of it.
    pub decrease: f64,
    pub iterations: usize,
}

/// A step, and what it did to the gradient.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    /// 1 / (step · change)
    inverse: f64,
}

/// Moves `x` to the minimum. `evaluate` gives the value at a place and writes the gradient there;
/// None ends everything. Returns the iterations taken.
pub(super) fn minimize(
    x: &mut Vec<f64>,
    until: Until,
    mut evaluate: impl FnMut(&[f64], &mut [f64]) -> Option<f64>,
) -> Option<usize> {
    let mut gradient = vec![0.0; x.len()];
    let mut value = evaluate(x, &mut gradient)?;
    let (mut next, mut next_gradient) = (x.clone(), gradient.clone());
    let mut memory: Vec<Pair> = Vec::with_capacity(MEMORY + 1);
    for iteration in 0..until.iterations {
        let largest = gradient.iter().fold(0f64, |most, g| most.max(g.abs()));
        if largest <= until.gradient || !largest.is_finite() {
            return Some(iteration);
        }
        let mut direction = direction(&gradient, &memory);
        let mut slope = dot(&gradient, &direction);
        if slope >= 0.0 {
            memory.clear();
            direction = gradient.iter().map(|g| -g).collect();
            slope = -dot(&gradient, &gradient);
        }
        // Nothing is known about the scale before the first step.
        let mut step = match memory.is_empty() {
            true => (1.0 / (-slope).sqrt()).min(1.0),
            false => 1.0,
        };
        // What rounding may do to the value.
        let noise = 1e-10 * value.abs();
        let mut decreased = None;
        for _ in 0..ATTEMPTS {
            for ((next, x), d) in next.iter_mut().zip(&*x).zip(&direction) {
                *next = x + step * d;
            }
            let new = evaluate(&next, &mut next_gradient)?;
            if new <= value + SUFFICIENT * step * slope + noise {
                decreased = Some(new);
                break;
            }
            // The minimum of the parabola through what is known, not too near to either end.
            let curvature = 2.0 * (new - value - step * slope);
            let best = -slope * step * step / curvature;
            step = match best.is_finite() {
                true => best.clamp(0.1 * step, 0.5 * step),
                false => 0.1 * step,
            };
        }
        let Some(new) = decreased else {
            // As low as digits allow.
            return Some(iteration);
        };
        let difference = |(a, b): (&f64, &f64)| a - b;
        let taken: Vec<f64> = next.iter().zip(&*x).map(difference).collect();
        let change: Vec<f64> = next_gradient
            .iter()
            .zip(&gradient)
            .map(difference)
            .collect();
        let product = dot(&taken, &change);
        if product > 0.0 {
            memory.push(Pair {
                step: taken,
                change,
                inverse: 1.0 / product,
            });
            if memory.len() > MEMORY {
                memory.remove(0);
            }
        }
        std::mem::swap(x, &mut next);
        std::mem::swap(&mut gradient, &mut next_gradient);
        let fallen = value - new;
        value = new;
        if fallen <= until.decrease * value.abs() {
            return Some(iteration + 1);
        }
    }
    Some(until.iterations)
}

/// Where to go: minus the gradient times the inverse curvature that the pairs have shown.
fn direction(gradient: &[f64], memory: &[Pair]) -> Vec<f64> {
    let mut q: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut factors = Vec::with_capacity(memory.len());
    for pair in memory.iter().rev() {
        let factor = pair.inverse * dot(&pair.step, &q);
        add(&mut q, -factor, &pair.change);
        factors.push(factor);
    }
    if let Some(last) = memory.last() {
        let scale = 1.0 / (last.inverse * dot(&last.change, &last.change));
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for (pair, factor) in memory.iter().zip(factors.into_iter().rev()) {
        let other = pair.inverse * dot(&pair.change, &q);
        add(&mut q, factor - other, &pair.step);
    }
    q
}

/// `to += factor · values`
fn add(to: &mut [f64], factor: f64, values: &[f64]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += factor * value;
    }
}

/// In eight sums, which the compiler turns into vectors.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for (a, b) in a.iter().zip(b) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.into_iter().sum::<f64>() + rest.sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIGHT: Until = Until {
        gradient: 1e-9,
        decrease: 0.0,
        iterations: 500,
    };

    #[test]
    fn the_minimum_of_an_uneven_bowl() {
        let scale = |i: usize| 10f64.powi(i as i32 % 5);
        let mut x = vec![3.0; 40];
        let iterations = minimize(&mut x, TIGHT, |x, g| {
            for (i, (g, x)) in g.iter_mut().zip(x).enumerate() {
                *g = scale(i) * (x - i as f64);
            }
            let terms = x.iter().enumerate();
            Some(
                terms
                    .map(|(i, x)| 0.5 * scale(i) * (x - i as f64).powi(2))
                    .sum(),
            )
        });
        assert!(iterations.unwrap() < 60);
        for (i, x) in x.iter().enumerate() {
            assert!((x - i as f64).abs() < 1e-6, "{i}: {x}");
        }
    }

    #[test]
    fn a_function_that_is_no_parabola() {
        // Σ (eˣ - a x): its minimum is at ln a.
        let mut x = vec![-4.0, 0.0, 5.0];
        minimize(&mut x, TIGHT, |x, g| {
            let mut sum = 0.0;
            for (i, (g, x)) in g.iter_mut().zip(x).enumerate() {
                let a = (i + 1) as f64;
                *g = x.exp() - a;
                sum += x.exp() - a * x;
            }
            Some(sum)
        });
        for (i, x) in x.iter().enumerate() {
            assert!((x - ((i + 1) as f64).ln()).abs() < 1e-6, "{i}: {x}");
        }
    }

    #[test]
    fn it_ends_when_told_to() {
        let mut left = 3;
        let result = minimize(&mut vec![1.0], TIGHT, |x, g| {
            left -= 1;
            g[0] = 1e-3 * x[0];
            (left > 0).then_some(5e-4 * x[0] * x[0])
        });
        assert_eq!(result, None);
    }
}
