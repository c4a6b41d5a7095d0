//! Which class of a network a data set's class is.

use std::collections::HashMap;

use super::imagenet_labels;

static WORDNET_IDS: &str = include_str!("../../assets/imagenet_wordnet_ids.txt");

/// Why a data set's classes are not the network's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ClassError {
    #[error(
        "class {name}: is no label of the network, no WordNet id of ImageNet and no index from 0 to {last} (name the classes as the network does; sconce classify shows how, --labels gives it other names)"
    )]
    Unknown { name: String, last: usize },
    #[error("class {name}: is not {kind}, as class {other} is (name all classes in the same way)")]
    Mixed {
        name: String,
        kind: &'static str,
        other: String,
    },
    #[error(
        "class {name}: the network has several classes of that name, {first} and {second} (name all classes by their indices{or_ids})"
    )]
    Ambiguous {
        name: String,
        first: usize,
        second: usize,
        or_ids: &'static str,
    },
    #[error("classes {first} and {second} are the same class of the network, {label}")]
    Twice {
        first: String,
        second: String,
        label: String,
    },
}

/// For each name that a data set gives a class, the index of the network's class with these
/// `labels`. Names are labels, else WordNet ids where the network's classes are ImageNet's, else
/// indices: the first of these that one of the names is, and then all must be. Capitals and what
/// is neither letter nor digit count in labels only where they must (`Egyptian_cat` will do).
///
/// # Errors
/// Names the first class that is none of the network's.
pub fn match_classes(names: &[String], labels: &[String]) -> Result<Vec<usize>, ClassError> {
    let by_label = Labels::new(labels);
    let ids = wordnet_ids(labels);
    type Find<'a> = Box<dyn Fn(&str) -> Option<Result<usize, ClassError>> + 'a>;
    let kinds: [(&'static str, Find); 3] = [
        (
            "a label of the network",
            Box::new(|name| by_label.find(name)),
        ),
        (
            "a WordNet id of ImageNet",
            Box::new(|name| ids.get(name).copied().map(Ok)),
        ),
        (
            "an index",
            Box::new(|name| {
                let index = name.parse().ok().filter(|&i: &usize| i < labels.len());
                index.map(Ok)
            }),
        ),
    ];
    let first = |(_, find): &&(_, Find)| names.iter().any(|name| find(name).is_some());
    let Some((kind, find)) = kinds.iter().find(first) else {
        return match names.first() {
            None => Ok(Vec::new()),
            Some(name) => Err(ClassError::Unknown {
                name: name.clone(),
                last: labels.len().saturating_sub(1),
            }),
        };
    };
    let known = names.iter().find(|name| find(name).is_some());
    let mut found = Vec::with_capacity(names.len());
    let mut taken: HashMap<usize, &String> = HashMap::new();
    for name in names {
        let class = find(name).unwrap_or_else(|| {
            Err(ClassError::Mixed {
                name: name.clone(),
                kind,
                other: known.cloned().unwrap_or_default(),
            })
        })?;
        if let Some(first) = taken.insert(class, name) {
            return Err(ClassError::Twice {
                first: first.clone(),
                second: name.clone(),
                label: labels[class].clone(),
            });
        }
        found.push(class);
    }
    Ok(found)
}

/// Classes by their labels.
struct Labels<'a> {
    exact: HashMap<&'a str, Vec<usize>>,
    plain: HashMap<String, Vec<usize>>,
    imagenet: bool,
}

impl<'a> Labels<'a> {
    fn new(labels: &'a [String]) -> Self {
        let mut exact: HashMap<&str, Vec<usize>> = HashMap::new();
        let mut simple: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, label) in labels.iter().enumerate() {
            exact.entry(label).or_default().push(index);
            simple.entry(plain(label)).or_default().push(index);
        }
        Self {
            exact,
            plain: simple,
            imagenet: imagenet_offset(labels).is_some(),
        }
    }

    fn find(&self, name: &str) -> Option<Result<usize, ClassError>> {
        let exact = self.exact.get(name);
        let found = exact.or_else(|| self.plain.get(&plain(name)))?;
        Some(match found.as_slice() {
            [first, second, ..] => Err(ClassError::Ambiguous {
                name: name.to_string(),
                first: *first,
                second: *second,
                or_ids: if self.imagenet { " or WordNet ids" } else { "" },
            }),
            only => Ok(only.first().copied().unwrap_or_default()),
        })
    }
}

/// Words in small letters and digits, with a space between.
fn plain(name: &str) -> String {
    let name = name.to_lowercase();
    let words = name.split(|c: char| !c.is_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join(" ")
}

/// The index of ImageNet's first class, where the network's classes are those.
fn imagenet_offset(labels: &[String]) -> Option<usize> {
    let own = imagenet_labels();
    // TensorFlow's networks put one for everything else before them.
    let offset = labels.len().checked_sub(own.len()).filter(|&o| o <= 1)?;
    // Other lists have more names for a class, the same one first.
    let same = |(label, own): &(&String, &String)| plain(label).starts_with(&plain(own));
    let agree = labels[offset..].iter().zip(&own).filter(same).count();
    (agree > own.len() / 2).then_some(offset)
}

/// ImageNet's ids with their classes, where the network knows these.
fn wordnet_ids(labels: &[String]) -> HashMap<&'static str, usize> {
    match imagenet_offset(labels) {
        Some(offset) => WORDNET_IDS.lines().zip(offset..).collect(),
        None => HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    fn error(given: &[&str], labels: &[String]) -> String {
        match_classes(&names(given), labels)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn classes_are_labels_ids_or_indices() {
        let imagenet = imagenet_labels();
        let found = |given: &[&str]| match_classes(&names(given), &imagenet).unwrap();
        assert_eq!(found(&["Egyptian cat", "tench"]), [285, 0]);
        assert_eq!(found(&["egyptian_cat"]), [285]);
        assert_eq!(
            found(&["n02123045", "n15075141", "n01440764"]),
            [281, 999, 0]
        );
        assert_eq!(found(&["0", "00281", "999"]), [0, 281, 999]);
        assert_eq!(found(&[]), Vec::<usize>::new());
        let mut tensorflow = names(&["background"]);
        tensorflow.extend(imagenet_labels());
        let found = match_classes(&names(&["n02123045"]), &tensorflow);
        assert_eq!(found, Ok(vec![282]));
        // A label that looks like an index is a label.
        let digits = names(&["3", "1", "7"]);
        assert_eq!(match_classes(&names(&["1", "7"]), &digits), Ok(vec![1, 2]));
    }

    #[test]
    fn a_class_that_is_none_of_the_networks_is_named() {
        let own = names(&["daisy", "rose", "Rose"]);
        assert!(error(&["tulip"], &own).contains("class tulip: is no label"));
        assert!(error(&["3"], &own).contains("class 3"));
        assert!(error(&["n02123045"], &own).contains("class n02123045"));
        let mixed = error(&["1", "daisy"], &own);
        assert!(mixed.contains("class 1: is not a label of the network, as class daisy is"));
        assert_eq!(match_classes(&names(&["rose"]), &own), Ok(vec![1]));
        assert!(error(&["ROSE"], &own).contains("1 and 2"));
        let mut imagenet = imagenet_labels();
        imagenet[134] = "crane".into();
        let crane = error(&["crane"], &imagenet);
        assert!(
            crane.contains("134 and 517") && crane.contains("WordNet"),
            "{crane}"
        );
        let twice = error(&["tench", "Tench"], &imagenet);
        assert!(twice.contains("tench and Tench"), "{twice}");
    }

    #[test]
    fn the_ids_are_those_of_the_labels() {
        let ids: Vec<&str> = WORDNET_IDS.lines().collect();
        assert_eq!(ids.len(), 1000);
        // ImageNet's classes are in the order of their ids.
        assert!(ids.is_sorted());
    }
}
