//! Files of plain URLs, in the cache of torch.hub: `TORCH_HOME/hub/checkpoints/FILE`.

use std::path::PathBuf;

use reqwest::Url;

use super::http::{Target, Wanted};
use super::repository::{lock, with_suffix};
use super::verify::Checksum;
use super::{Hub, HubError};

/// Where torchvision publishes its weights.
const TORCH_ENDPOINT: &str = "https://download.pytorch.org/models";

impl Hub {
    /// The address of one of torchvision's files.
    pub fn torchvision_url(&self, file: &str) -> String {
        let endpoint = match &self.endpoint {
            Some(endpoint) => Some(format!("{endpoint}/models")),
            None => std::env::var("SCONCE_TORCH_ENDPOINT").ok(),
        };
        let endpoint = endpoint.as_deref().unwrap_or(TORCH_ENDPOINT);
        format!("{}/{file}", endpoint.trim_end_matches('/'))
    }

    /// The folder that files of URLs are kept in.
    fn checkpoints(&self) -> PathBuf {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let home = || {
            variable("HOME")
                .or_else(|| variable("USERPROFILE"))
                .unwrap_or_default()
        };
        let cache = || variable("XDG_CACHE_HOME").unwrap_or_else(|| home().join(".cache"));
        let torch = self.torch_home.clone().or_else(|| variable("TORCH_HOME"));
        let torch = torch.unwrap_or_else(|| cache().join("torch"));
        torch.join("hub").join("checkpoints")
    }

    /// A URL's file, where this machine has it.
    pub fn cached_url(&self, url: &str) -> Option<PathBuf> {
        let path = self.checkpoints().join(file_name(url)?);
        path.is_file().then_some(path)
    }

    /// Brings a URL's file into the cache, unless a file of that name is there; gives its path.
    ///
    /// # Errors
    /// See [`HubError`].
    pub fn fetch_url(&self, url: &str) -> Result<PathBuf, HubError> {
        let address = || HubError::Address(url.to_string());
        let name = file_name(url).ok_or_else(address)?;
        let path = self.checkpoints().join(&name);
        if path.is_file() {
            return Ok(path);
        }
        if self.offline {
            return Err(HubError::Offline { what: url.into() });
        }
        let progress = &*self.progress;
        let hidden = path.with_file_name(format!(".{name}"));
        let _lock = lock(&with_suffix(&hidden, ".lock"), &name, progress)?;
        // Another process may have been faster.
        if !path.is_file() {
            let checksum = Checksum::of_file_name(&name);
            let url = Url::parse(url).map_err(|_| address())?;
            let target = Target {
                what: &name,
                url: &url,
                token: None,
            };
            let wanted = Wanted {
                target,
                size: None,
                resume: checksum != Checksum::Unknown,
            };
            let partial = with_suffix(&hidden, ".partial");
            self.fetch_checked(&wanted, &partial, &path, &checksum)?;
        }
        Ok(path)
    }
}

/// The name that a URL's file gets, as torch.hub names it.
fn file_name(url: &str) -> Option<String> {
    let url = Url::parse(url).ok()?;
    if !matches!(url.scheme(), "http" | "https") {
        return None;
    }
    let name = url.path_segments()?.next_back()?.to_string();
    (!name.is_empty() && name != ".." && !name.starts_with('.')).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_names_its_file() {
        let name = file_name("https://download.pytorch.org/models/resnet18-f37072fd.pth?x=1");
        assert_eq!(name.as_deref(), Some("resnet18-f37072fd.pth"));
        for url in [
            "https://host",
            "https://host/",
            "file:///etc/passwd",
            "x",
            "https://h/..",
        ] {
            assert_eq!(file_name(url), None, "{url}");
        }
    }
}
