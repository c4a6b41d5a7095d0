//! Non-strict loading: the tensors of a file under our names, whatever names they have there.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use super::dialects::{self, Dialect, Table};
use crate::exec::params::{LoadReport, TensorSource};
use crate::graph::{Graph, Op, Parameter};
use crate::models::Architecture;
use crate::models::registry::{self, IMAGENET_CLASSES};

/// What becomes of the classification head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The file's, with as many classes as it has there.
    FromFile,
    /// A head for so many classes: the file's where it has as many and `reset` is off, else a
    /// fresh one.
    Classes { count: usize, reset: bool },
}

/// A network and the file's tensors under its names.
pub struct Fitted {
    /// As asked for, but where the file's dialect or shapes say otherwise: epsilons and padding
    /// differ between libraries, and positions are learned for one image size.
    pub architecture: Architecture,
    pub graph: Graph,
    /// The tensors that the network takes; what the file holds besides has its own names.
    pub source: Arc<dyn TensorSource>,
    pub report: LoadReport,
    /// Whose names the file has.
    pub dialect: Dialect,
}

/// Why a file's tensors are not those of a network.
#[derive(Debug, thiserror::Error)]
pub enum FitError {
    #[error("{}{}", describe(.report), looks_like(.closest))]
    OtherNetwork {
        report: Box<LoadReport>,
        /// The network of the registry that the tensors fit best.
        closest: Option<&'static str>,
    },
    #[error(
        "no tensor {tensor} of two dimensions for its head (only a single linear layer is understood)"
    )]
    NoHead { tensor: String },
}

/// A few words on what does not fit.
pub fn describe(report: &LoadReport) -> String {
    let mut parts = Vec::new();
    if let Some(first) = report.missing.first() {
        let count = report.missing.len();
        parts.push(format!("{count} tensors missing, first {first}"));
    }
    if let Some((name, (wanted, held))) = report.mismatched.first_key_value() {
        let count = report.mismatched.len();
        parts.push(format!(
            "{count} of another shape, first {name}: {held:?} for {wanted:?}"
        ));
    }
    parts.join("; ")
}

fn looks_like(closest: &Option<&str>) -> String {
    match closest {
        Some(name) => format!(" (it looks like {name}: try -m {name})"),
        None => " (it looks like no network that sconce knows)".into(),
    }
}

/// Brings the tensors of `file` under the names of `architecture`.
///
/// The names in the file may be those of any library that has the network, with a prefix before
/// them (`module.`, `model.`). The backbone must be there whole; `head` says what becomes of the
/// rest. Tensors that the network does not have are reported as unexpected and do no harm.
///
/// # Errors
/// Where a tensor of the backbone is missing or has another shape, or a head is wanted and the
/// file has none.
pub fn fit(
    file: Arc<dyn TensorSource>,
    architecture: &Architecture,
    head: Head,
) -> Result<Fitted, FitError> {
    let held = Held::new(&*file);
    let candidates = candidates(architecture);
    let Some(best) = best_match(&held, &candidates) else {
        return Err(FitError::OtherNetwork {
            report: Box::new(strict_report(&held, architecture)),
            closest: closest(&*file),
        });
    };
    let backbone_fits = best.fitting == best.candidate.backbone.len();
    let found = find_head(&held, best.candidate, &best.prefix);
    let Match {
        candidate: Candidate { table, .. },
        prefix,
        architecture,
        ..
    } = best;
    let classes = match (head, &found) {
        (Head::Classes { count, .. }, _) => count,
        (Head::FromFile, Some(found)) => found.classes,
        (Head::FromFile, None) => IMAGENET_CLASSES,
    };
    let graph = architecture.graph(classes);
    let head_name = &graph.head().name;
    let mut report = LoadReport::default();
    let mut parts = HashMap::new();
    let mut taken = BTreeSet::new();
    for parameter in graph.parameters() {
        let names = match in_module(&parameter.name, head_name) {
            true => match &found {
                Some(_) if matches!(head, Head::Classes { reset: true, .. }) => Vec::new(),
                Some(found) => found.names(parameter, head_name),
                None => Vec::new(),
            },
            false => prefixed(&prefix, &names_of(table, parameter)),
        };
        let name = parameter.name.clone();
        match held.meets(&names, &parameter.shape) {
            Meets::Missing => {
                report.missing.insert(name);
                continue;
            }
            Meets::Shape => {
                report.loaded.insert(name.clone());
            }
            Meets::OtherShape(shape) => {
                let shapes = (parameter.shape.clone(), shape);
                report.mismatched.insert(name.clone(), shapes);
            }
        }
        taken.extend(names.iter().cloned());
        let shape = match report.mismatched.get(&name) {
            Some((_, held)) => held.clone(),
            None => parameter.shape.clone(),
        };
        parts.insert(name, Part { names, shape });
    }
    let others = held.shapes.keys().filter(|n| !taken.contains(*n));
    report.unexpected = others
        .filter(|n| !is_counter(n))
        .map(|n| n.to_string())
        .collect();
    if !backbone_fits {
        report.missing.retain(|n| !in_module(n, head_name));
        report.mismatched.retain(|n, _| !in_module(n, head_name));
        return Err(FitError::OtherNetwork {
            report: Box::new(report),
            closest: closest(&*file),
        });
    }
    if head == Head::FromFile && found.is_none() {
        let weight = format!("{head_name}.weight");
        let theirs = table
            .theirs(&weight)
            .and_then(|t| t.names.into_iter().next());
        return Err(FitError::NoHead {
            tensor: theirs.unwrap_or(weight),
        });
    }
    let unexpected: Vec<String> = report.unexpected.iter().cloned().collect();
    drop(held);
    Ok(Fitted {
        architecture,
        graph,
        source: Arc::new(Renamed {
            file,
            parts,
            unexpected,
        }),
        report,
        dialect: table.dialect,
    })
}

/// The network of the registry that a file's tensors fit best, where they fit one at least in
/// half.
pub fn closest(file: &dyn TensorSource) -> Option<&'static str> {
    // Made once, since it takes longer than to look at a file.
    static CANDIDATES: OnceLock<Vec<Vec<Candidate>>> = OnceLock::new();
    let all = CANDIDATES.get_or_init(|| {
        let rows = registry::all().iter();
        rows.map(|row| candidates(&row.architecture)).collect()
    });
    let held = Held::new(file);
    let mut best: Option<(f64, u8, &str)> = None;
    for (row, candidates) in registry::all().iter().zip(all) {
        let Some(found) = best_match(&held, candidates) else {
            continue;
        };
        let Candidate { backbone, head, .. } = found.candidate;
        if 2 * found.fitting <= backbone.len() {
            continue;
        }
        // Of what either side has, how much is common.
        let either = backbone.len() + held.shapes.len() - found.fitting;
        let score = found.fitting as f64 / either as f64;
        if best.is_some_and(|(most, ..)| score < most) {
            continue;
        }
        // Of networks with the same backbone: a table whose configuration is another row's
        // belongs to that row, and one of them may have no bias in its head.
        let own = found.architecture == row.architecture;
        let bias = find_head(&held, found.candidate, &found.prefix)
            .map(|h| held.shapes.contains_key(&format!("{}.bias", h.module)));
        let own = u8::from(own) + u8::from(bias == Some(head.bias));
        if best.is_none_or(|(most, was_own, _)| (score, own) > (most, was_own)) {
            best = Some((score, own, row.name));
        }
    }
    best.map(|(_, _, name)| name)
}

/// A network in one dialect, as it is looked for in files.
struct Candidate {
    table: Table,
    /// For each parameter before the head its names in the dialect, and its shape.
    backbone: Vec<(Vec<String>, Vec<usize>)>,
    head: LinearHead,
}

/// The linear layer that a network ends in, under our name.
struct LinearHead {
    name: String,
    /// None where the network ends in something else.
    in_features: Option<usize>,
    bias: bool,
}

/// A network in every dialect.
fn candidates(architecture: &Architecture) -> Vec<Candidate> {
    let candidate = |table: Table| {
        let graph = table.architecture.graph(IMAGENET_CLASSES);
        let head = graph.head();
        let backbone = graph
            .parameters()
            .filter(|p| !in_module(&p.name, &head.name))
            .map(|p| (names_of(&table, p), p.shape.clone()));
        Candidate {
            backbone: backbone.collect(),
            head: LinearHead {
                name: head.name.clone(),
                in_features: match head.op {
                    Op::Linear { in_features, .. } => Some(in_features),
                    _ => None,
                },
                bias: head.parameters.len() == 2,
            },
            table,
        }
    };
    let tables = dialects::tables(architecture).into_iter();
    tables.map(candidate).collect()
}

/// A dialect, and where in the file its names begin, that fit as well as any.
struct Match<'a> {
    candidate: &'a Candidate,
    prefix: String,
    architecture: Architecture,
    /// Parameters of the backbone that are there in their shape.
    fitting: usize,
}

/// None where no dialect has a single tensor in common with the file.
fn best_match<'a>(held: &Held, candidates: &'a [Candidate]) -> Option<Match<'a>> {
    let mut best: Option<Match> = None;
    for candidate in candidates {
        let mut found: Option<(usize, String)> = None;
        for prefix in held.prefixes(candidate) {
            let fitting = held.count_fitting(candidate, &prefix);
            if found.as_ref().is_none_or(|(most, _)| fitting > *most) {
                found = Some((fitting, prefix));
            }
        }
        let Some((mut fitting, prefix)) = found else {
            continue;
        };
        let architecture = match follow(held, &candidate.table, &prefix) {
            Some(other) => {
                fitting += 1;
                other
            }
            None => candidate.table.architecture,
        };
        if best.as_ref().is_none_or(|b| fitting > b.fitting) {
            best = Some(Match {
                candidate,
                prefix,
                architecture,
                fitting,
            });
        }
    }
    best.filter(|b| b.fitting > 0)
}

/// A Vision Transformer whose positions were learned on images of another size.
fn follow(held: &Held, table: &Table, prefix: &str) -> Option<Architecture> {
    let Architecture::VisionTransformer(mut config) = table.architecture else {
        return None;
    };
    let theirs = table.theirs("encoder.pos_embedding")?;
    let name = format!("{prefix}{}", theirs.names.first()?);
    let &[1, length, dim] = held.shapes.get(name.as_str())?.as_slice() else {
        return None;
    };
    let grid = length.checked_sub(1)?.isqrt();
    let other = grid * grid + 1 == length && grid * config.patch != config.image_size;
    if dim != config.dim || !other || grid == 0 {
        return None;
    }
    config.image_size = grid.checked_mul(config.patch)?;
    let architecture = Architecture::VisionTransformer(config);
    architecture.check().is_ok().then_some(architecture)
}

/// What is wrong where nothing at all fits.
fn strict_report(held: &Held, architecture: &Architecture) -> LoadReport {
    let graph = architecture.graph(IMAGENET_CLASSES);
    LoadReport {
        missing: graph.parameters().map(|p| p.name.clone()).collect(),
        unexpected: held.shapes.keys().map(|n| n.to_string()).collect(),
        ..LoadReport::default()
    }
}

/// The dialect's names for a parameter of the backbone.
fn names_of(table: &Table, parameter: &Parameter) -> Vec<String> {
    let theirs = table.theirs(&parameter.name);
    theirs.map(|t| t.names).unwrap_or_default()
}

fn prefixed(prefix: &str, names: &[String]) -> Vec<String> {
    names.iter().map(|n| format!("{prefix}{n}")).collect()
}

/// Whether a tensor belongs to a module.
fn in_module(tensor: &str, module: &str) -> bool {
    let rest = tensor.strip_prefix(module);
    rest.is_some_and(|rest| rest.starts_with('.'))
}

/// A counter that PyTorch keeps and nothing needs.
fn is_counter(name: &str) -> bool {
    name.ends_with("num_batches_tracked")
}

/// Names and shapes of a file, without counters.
struct Held {
    shapes: HashMap<String, Vec<usize>>,
}

enum Meets {
    Missing,
    /// The shape asked for, but for dimensions of 1.
    Shape,
    OtherShape(Vec<usize>),
}

/// So many places in a file are tried as the one where names begin.
const MOST_PREFIXES: usize = 8;

impl Held {
    fn new(file: &dyn TensorSource) -> Self {
        let names = file.names().into_iter().filter(|n| !is_counter(n));
        let shapes = names.filter_map(|name| {
            let shape = file.shape(&name)?;
            Some((name, shape))
        });
        Self {
            shapes: shapes.collect(),
        }
    }

    /// What may stand before a dialect's names: what stands before its first and its last.
    fn prefixes(&self, candidate: &Candidate) -> Vec<String> {
        let mut prefixes = BTreeSet::new();
        let ends = [candidate.backbone.first(), candidate.backbone.last()];
        for (names, _) in ends.into_iter().flatten() {
            let Some(anchor) = names.first() else {
                continue;
            };
            let before = self
                .shapes
                .keys()
                .filter_map(|n| n.strip_suffix(anchor.as_str()));
            let whole = before.filter(|p| p.is_empty() || p.ends_with('.'));
            prefixes.extend(whole.map(|p| (p.len(), p)));
        }
        let shortest = prefixes.into_iter().take(MOST_PREFIXES);
        shortest.map(|(_, prefix)| prefix.to_string()).collect()
    }

    /// How many parameters of the backbone are there in their shape.
    fn count_fitting(&self, candidate: &Candidate, prefix: &str) -> usize {
        let mut name = prefix.to_string();
        let fits = |(names, wanted): &&(Vec<String>, Vec<usize>)| {
            let shapes = names.iter().map(|n| {
                name.truncate(prefix.len());
                name.push_str(n);
                self.shapes.get(name.as_str())
            });
            matches!(joined(shapes, wanted), Meets::Shape)
        };
        candidate.backbone.iter().filter(fits).count()
    }

    /// How the tensors of these names, joined, meet a shape.
    fn meets(&self, names: &[String], wanted: &[usize]) -> Meets {
        joined(names.iter().map(|n| self.shapes.get(n)), wanted)
    }
}

/// How tensors of these shapes, joined along the first dimension, meet a shape.
fn joined<'a>(mut shapes: impl Iterator<Item = Option<&'a Vec<usize>>>, wanted: &[usize]) -> Meets {
    let Some(Some(first)) = shapes.next() else {
        return Meets::Missing;
    };
    let mut length = first.first().copied();
    for shape in shapes {
        let Some(shape) = shape else {
            return Meets::Missing;
        };
        match (&mut length, first.split_first(), shape.split_first()) {
            (Some(length), Some((_, rest)), Some((more, others))) if rest == others => {
                *length = length.saturating_add(*more);
            }
            _ => return Meets::OtherShape(shape.clone()),
        }
    }
    let rest = first.get(1..).unwrap_or_default();
    let whole = length.iter().chain(rest).copied();
    if without_ones(whole.clone()).eq(without_ones(wanted.iter().copied())) {
        Meets::Shape
    } else {
        Meets::OtherShape(whole.collect())
    }
}

/// A shape without its dimensions of 1.
fn without_ones(shape: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> {
    shape.filter(|&d| d != 1)
}

/// The head's linear layer in a file.
struct FoundHead {
    module: String,
    classes: usize,
}

impl FoundHead {
    /// The file's name for a parameter of our head.
    fn names(&self, parameter: &Parameter, head: &str) -> Vec<String> {
        let leaf = parameter.name.strip_prefix(head).unwrap_or_default();
        vec![format!("{}{leaf}", self.module)]
    }
}

/// Finds the head: under its name in the dialect, inside or outside the prefix; else the only
/// linear layer of the right width in a module of about that name, as those who replace a head
/// by `Sequential(Dropout, Linear)` or by a plain layer leave it.
fn find_head(held: &Held, candidate: &Candidate, prefix: &str) -> Option<FoundHead> {
    let Candidate { table, head, .. } = candidate;
    let in_features = head.in_features?;
    let classes = |module: &str| {
        let shape = held.shapes.get(&format!("{module}.weight"))?;
        match shape[..] {
            [classes, features] | [classes, features, 1, 1] if features == in_features => {
                (classes > 0).then_some(classes)
            }
            _ => None,
        }
    };
    let found = |module: String| {
        let classes = classes(&module)?;
        Some(FoundHead { module, classes })
    };
    let theirs = table.theirs(&format!("{}.weight", head.name))?;
    let theirs = theirs.names.first()?.strip_suffix(".weight")?.to_string();
    let outer = ancestors(prefix);
    if let Some(head) = outer.iter().find_map(|p| found(format!("{p}{theirs}"))) {
        return Some(head);
    }
    let root = |module: &str| module.split('.').next().unwrap_or_default().to_string();
    let roots: Vec<String> = outer
        .iter()
        .flat_map(|p| [root(&theirs), root(&head.name)].map(|root| format!("{p}{root}")))
        .collect();
    let inside = |module: &str| {
        let mut roots = roots.iter();
        roots.any(|root| module == root || in_module(module, root))
    };
    let mut candidates = held
        .shapes
        .keys()
        .filter_map(|name| name.strip_suffix(".weight"))
        .filter(|module| inside(module) && classes(module).is_some());
    match (candidates.next(), candidates.next()) {
        (Some(module), None) => found(module.to_string()),
        _ => None,
    }
}

/// `a.b.` gives itself, `a.` and nothing.
fn ancestors(prefix: &str) -> Vec<&str> {
    let mut all = vec![prefix];
    let mut rest = prefix;
    while let Some(inner) = rest.strip_suffix('.') {
        rest = inner.rfind('.').map_or("", |at| &inner[..=at]);
        all.push(rest);
    }
    all
}

/// A file's tensors under our names.
struct Renamed {
    file: Arc<dyn TensorSource>,
    /// By our name.
    parts: HashMap<String, Part>,
    /// Names of the file that the network does not take: they are listed, and not to be had.
    unexpected: Vec<String>,
}

/// What one of our tensors is made from.
struct Part {
    /// Joined along the first dimension.
    names: Vec<String>,
    /// As the network asks for it, unless the file has another.
    shape: Vec<usize>,
}

impl TensorSource for Renamed {
    fn names(&self) -> Vec<String> {
        self.parts.keys().chain(&self.unexpected).cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.parts.get(name).map(|part| part.shape.clone())
    }

    fn read(&self, name: &str) -> candle_core::Result<Vec<f32>> {
        let Some(part) = self.parts.get(name) else {
            return Err(candle_core::Error::CannotFindTensor { path: name.into() });
        };
        match &part.names[..] {
            [name] => self.file.read(name),
            names => {
                let parts = names.iter().map(|n| self.file.read(n));
                Ok(parts.collect::<candle_core::Result<Vec<_>>>()?.concat())
            }
        }
    }
}
