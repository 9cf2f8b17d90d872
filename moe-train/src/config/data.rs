//! What `[data]` may say.

use super::{ConfigError, DataConfig, DataFormat, RunConfig, require};
use crate::data::{TokenizerKind, quotas};

/// Share of the documents of a text that is kept for evaluation, unless given.
const HELD_OUT: f64 = 0.05;

impl RunConfig {
    /// Fills in defaults that depend on other settings.
    pub(super) fn resolve_data(&mut self) {
        let data = &mut self.data;
        data.separate_documents = Some(data.separates_documents());
        if data.blend.is_empty() {
            data.held_out.get_or_insert(HELD_OUT);
        }
    }

    pub(super) fn check_data(&self) -> Result<(), ConfigError> {
        if self.data.format == DataFormat::PromptCompletion && self.data.separate_documents == Some(false) {
            return Err(ConfigError::Conflict {
                setting: "data.separate_documents",
                problem: "cannot be false",
                other: "data.format = \"prompt-completion\"".to_owned(),
                fix: "samples that share a sequence must not see each other; remove it".to_owned(),
            });
        }
        match self.data.blend.is_empty() {
            true => self.check_files()?,
            false => self.check_blend()?,
        }
        require("sample.prompt", "\"\"", !self.sample.prompt.is_empty(), "at least one character")?;
        let temperature = self.sample.temperature;
        let finite = (0.0..=f64::MAX).contains(&temperature);
        require("sample.temperature", temperature, finite, "finite and at least 0")
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        let DataConfig { files, held_out, validation, .. } = &self.data;
        let allowed = "a list of at least one pattern, unless there is a [[data.blend]]";
        require("data.files", "[]", !files.is_empty(), allowed)?;
        check_held_out(held_out.unwrap_or(HELD_OUT))?;
        if !validation.is_empty() {
            return Err(ConfigError::Conflict {
                setting: "data.validation",
                problem: "has no meaning",
                other: "data.files".to_owned(),
                fix: "documents of the files are held out, as many as data.held_out says; remove it"
                    .to_owned(),
            });
        }
        let vocab_size = self.model.vocab_size;
        let allowed = "at least 256 for data.tokenizer = \"byte\"";
        // The vocabulary of a file is known when a run opens it.
        let enough = vocab_size >= 256 || self.data.tokenizer != TokenizerKind::Byte;
        require("model.vocab_size", vocab_size, enough, allowed)
    }

    fn check_blend(&self) -> Result<(), ConfigError> {
        let DataConfig { files, held_out, validation, .. } = &self.data;
        let conflict = |setting, problem, other: &str, fix: &str| {
            Err(ConfigError::Conflict { setting, problem, other: other.to_owned(), fix: fix.to_owned() })
        };
        if !files.is_empty() {
            let fix =
                "text is tokenised into the folder of a run, a blend is read where it is; remove one of them";
            return conflict("data.files", "cannot stand", "[[data.blend]]", fix);
        }
        if let Some(held_out) = *held_out {
            check_held_out(held_out)?;
            if !validation.is_empty() {
                let fix = "evaluate on documents of the blend or on other tokens; remove one of them";
                return conflict("data.held_out", "cannot stand", "data.validation", fix);
            }
        }
        if validation.is_empty() && held_out.is_none() && self.train.eval_interval > 0 {
            let fix = "say what to evaluate on with data.held_out or data.validation, or remove it";
            return conflict("train.eval_interval", "has no meaning", "[[data.blend]] alone", fix);
        }
        quotas(&self.data.weights())?;
        Ok(())
    }
}

fn check_held_out(share: f64) -> Result<(), ConfigError> {
    require("data.held_out", share, share > 0.0 && share < 1.0, "above 0 and below 1")
}
