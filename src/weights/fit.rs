//! Non-strict loading: the tensors of a file under our names, whatever names they have there.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

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
    let Some(best) = best_match(&held, architecture) else {
        return Err(FitError::OtherNetwork {
            report: Box::new(strict_report(&held, architecture)),
            closest: closest(&*file),
        });
    };
    let backbone_fits = best.fitting == best.wanted;
    let Match {
        table,
        prefix,
        architecture,
        ..
    } = best;
    let found = find_head(&held, &table, &prefix, &architecture);
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
            false => names_of(&table, &prefix, parameter),
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
    let held = Held::new(file);
    let mut best = None;
    for row in registry::all() {
        let Some(found) = best_match(&held, &row.architecture) else {
            continue;
        };
        // Of what either side has, how much is common.
        let either = found.wanted + held.shapes.len() - found.fitting;
        let score = found.fitting as f64 / either as f64;
        // Of networks with the same backbone: a table whose configuration is another row's
        // belongs to that row, and one of them may have no bias in its head.
        let own = found.architecture == row.architecture;
        let head = find_head(&held, &found.table, &found.prefix, &row.architecture);
        let bias = head.map(|h| held.shapes.contains_key(&format!("{}.bias", h.module)));
        let head = row
            .architecture
            .graph(IMAGENET_CLASSES)
            .head()
            .parameters
            .len();
        let own = u8::from(own) + u8::from(bias == Some(head == 2));
        let better = best.is_none_or(|(most, was_own, _)| (score, own) > (most, was_own));
        if 2 * found.fitting > found.wanted && better {
            best = Some((score, own, row.name));
        }
    }
    best.map(|(_, _, name)| name)
}

/// A table, and where in the file its names begin, that fit as well as any.
struct Match {
    table: Table,
    prefix: String,
    architecture: Architecture,
    /// Parameters of the backbone that are there in their shape, of so many.
    fitting: usize,
    wanted: usize,
}

/// None where no dialect has a single tensor in common with the file.
fn best_match(held: &Held, architecture: &Architecture) -> Option<Match> {
    let mut best: Option<Match> = None;
    for table in dialects::tables(architecture) {
        let graph = table.architecture.graph(IMAGENET_CLASSES);
        let head = graph.head().name.clone();
        let backbone: Vec<&Parameter> = graph
            .parameters()
            .filter(|p| !in_module(&p.name, &head))
            .collect();
        let mut found: Option<(usize, String)> = None;
        for prefix in held.prefixes(&table, &backbone) {
            let fits = |p: &&&Parameter| {
                let names = names_of(&table, &prefix, p);
                matches!(held.meets(&names, &p.shape), Meets::Shape)
            };
            let fitting = backbone.iter().filter(fits).count();
            if found.as_ref().is_none_or(|(most, _)| fitting > *most) {
                found = Some((fitting, prefix));
            }
        }
        let Some((mut fitting, prefix)) = found else {
            continue;
        };
        let architecture = match follow(held, &table, &prefix) {
            Some(other) => {
                fitting += 1;
                other
            }
            None => table.architecture,
        };
        if best.as_ref().is_none_or(|b| fitting > b.fitting) {
            best = Some(Match {
                wanted: backbone.len(),
                table,
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

/// The file's names for a parameter of the backbone.
fn names_of(table: &Table, prefix: &str, parameter: &Parameter) -> Vec<String> {
    let theirs = table.theirs(&parameter.name);
    let names = theirs.map(|t| t.names).unwrap_or_default();
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
    shapes: BTreeMap<String, Vec<usize>>,
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

    /// What may stand before the names of a table: what stands before its first and its last.
    fn prefixes(&self, table: &Table, backbone: &[&Parameter]) -> Vec<String> {
        let mut prefixes = BTreeSet::new();
        for anchor in [backbone.first(), backbone.last()].into_iter().flatten() {
            let Some(theirs) = table.theirs(&anchor.name) else {
                continue;
            };
            let Some(anchor) = theirs.names.first() else {
                continue;
            };
            let before = self
                .shapes
                .keys()
                .filter_map(|n| n.strip_suffix(anchor.as_str()));
            let whole = before.filter(|p| p.is_empty() || p.ends_with('.'));
            prefixes.extend(whole.map(|p| (p.len(), p.to_string())));
        }
        let shortest = prefixes.into_iter().take(MOST_PREFIXES);
        shortest.map(|(_, prefix)| prefix).collect()
    }

    /// How the tensors of these names, joined, meet a shape.
    fn meets(&self, names: &[String], wanted: &[usize]) -> Meets {
        let mut shapes = names.iter().map(|n| self.shapes.get(n));
        let Some(Some(first)) = shapes.next() else {
            return Meets::Missing;
        };
        let mut joined = first.clone();
        for shape in shapes {
            let Some(shape) = shape else {
                return Meets::Missing;
            };
            match (joined.split_first_mut(), shape.split_first()) {
                (Some((length, rest)), Some((more, others))) if rest == others => {
                    *length = length.saturating_add(*more);
                }
                _ => return Meets::OtherShape(shape.clone()),
            }
        }
        if squeezed(&joined).eq(squeezed(wanted)) {
            Meets::Shape
        } else {
            Meets::OtherShape(joined)
        }
    }
}

/// A shape without its dimensions of 1.
fn squeezed(shape: &[usize]) -> impl Iterator<Item = usize> {
    shape.iter().copied().filter(|&d| d != 1)
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
fn find_head(
    held: &Held,
    table: &Table,
    prefix: &str,
    architecture: &Architecture,
) -> Option<FoundHead> {
    let graph = architecture.graph(IMAGENET_CLASSES);
    let head = graph.head();
    let Op::Linear { in_features, .. } = head.op else {
        return None;
    };
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
