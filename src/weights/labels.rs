//! Class names.

use std::collections::BTreeMap;
use std::path::Path;

static IMAGENET: &str = include_str!("../../assets/imagenet_labels.txt");

/// Why a file of class names cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelsError {
    #[error("{path}: {error}")]
    Io { path: String, error: std::io::Error },
    #[error(
        "{path}: {reason} (expected a name a line, or JSON: a list of names or a map from index to name)"
    )]
    Format { path: String, reason: String },
}

/// The 1000 classes of ImageNet-1k.
pub fn imagenet_labels() -> Vec<String> {
    IMAGENET.lines().map(str::to_string).collect()
}

/// Reads class names: a name a line, a JSON list, or the JSON map from index to name that many
/// training scripts write.
///
/// # Errors
/// Where the file cannot be read, or a map's indices are not 0 to n - 1.
pub fn read_labels(path: &Path) -> Result<Vec<String>, LabelsError> {
    let shown = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|error| LabelsError::Io {
        path: shown(),
        error,
    })?;
    parse(&text).map_err(|reason| LabelsError::Format {
        path: shown(),
        reason,
    })
}

fn parse(text: &str) -> Result<Vec<String>, String> {
    let text = text.trim_start_matches('\u{feff}').trim();
    let labels = if text.starts_with('{') {
        let map: BTreeMap<String, String> =
            serde_json::from_str(text).map_err(|e| e.to_string())?;
        let mut named = BTreeMap::new();
        for (index, name) in map {
            let index: usize = index
                .parse()
                .map_err(|_| format!("{index:?} is not an index"))?;
            named.insert(index, name);
        }
        if let Some(gap) = (0..named.len()).find(|i| !named.contains_key(i)) {
            return Err(format!("index {gap} has no name"));
        }
        named.into_values().collect()
    } else if text.starts_with('[') {
        serde_json::from_str(text).map_err(|e| e.to_string())?
    } else {
        text.lines()
            .map(|l| l.trim().to_string())
            .collect::<Vec<_>>()
    };
    if labels.is_empty() || labels.iter().all(String::is_empty) {
        return Err("no names".into());
    }
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imagenet_has_a_thousand_classes() {
        let labels = imagenet_labels();
        assert_eq!(labels.len(), 1000);
        assert_eq!(labels[967], "espresso");
    }

    #[test]
    fn names_come_as_lines_a_list_or_a_map() {
        let expected = ["daisy", "rose", "tulip"];
        assert_eq!(parse("daisy\nrose \r\ntulip\n").unwrap(), expected);
        assert_eq!(parse(r#"["daisy", "rose", "tulip"]"#).unwrap(), expected);
        let map = r#"{"2": "tulip", "0": "daisy", "1": "rose"}"#;
        assert_eq!(parse(map).unwrap(), expected);
    }

    #[test]
    fn a_map_with_a_gap_or_without_indices_is_refused() {
        assert!(
            parse(r#"{"0": "daisy", "2": "tulip"}"#)
                .unwrap_err()
                .contains("index 1")
        );
        assert!(parse(r#"{"daisy": "0"}"#).is_err());
        assert!(parse("\n\n").is_err());
    }
}
