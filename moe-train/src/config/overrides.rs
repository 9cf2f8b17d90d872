//! `--set table.key=value`.

use toml::{Table, Value};

use super::ConfigError;

/// Sets one key. The value is read as TOML (`3`, `true`, `["a", "b"]`); what is none is a string.
pub(super) fn apply(root: &mut Table, text: &str) -> Result<(), ConfigError> {
    let malformed = || ConfigError::Override { text: text.to_owned() };
    let (path, value) = text.split_once('=').ok_or_else(malformed)?;
    let (table, key) = path.trim().split_once('.').ok_or_else(malformed)?;
    let (table, key) = (table.trim(), key.trim());
    if table.is_empty() || key.is_empty() {
        return Err(malformed());
    }
    let value = value.trim();
    let value = value.parse().unwrap_or_else(|_| Value::String(value.to_owned()));
    let section = root.entry(table).or_insert_with(|| Value::Table(Table::new()));
    let section = section.as_table_mut().ok_or_else(malformed)?;
    section.insert(key.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(texts: &[&str]) -> Table {
        let mut root: Table = "[train]\nsteps = 1\nseed = 2\n".parse().unwrap();
        for text in texts {
            apply(&mut root, text).unwrap();
        }
        root
    }

    #[test]
    fn values_are_toml_or_text() {
        let root = set(&[
            "train.steps=30",
            "data.files=[\"a*\", \"b=c\"]",
            "train.output=runs/x-1",
            "sample.prompt=\"3\"",
            "optimizer.lr = 1e-4",
        ]);
        assert_eq!(root["train"]["steps"], Value::Integer(30));
        assert_eq!(root["train"]["seed"], Value::Integer(2));
        assert_eq!(root["data"]["files"][1], Value::String("b=c".into()));
        assert_eq!(root["train"]["output"], Value::String("runs/x-1".into()));
        assert_eq!(root["sample"]["prompt"], Value::String("3".into()));
        assert_eq!(root["optimizer"]["lr"], Value::Float(1e-4));
    }

    #[test]
    fn a_value_cannot_smuggle_in_a_second_key() {
        let root = set(&["train.output=1\nseed = 9"]);
        assert_eq!(root["train"]["output"], Value::String("1\nseed = 9".into()));
        assert_eq!(root["train"]["seed"], Value::Integer(2));
    }

    #[test]
    fn what_is_no_assignment_is_refused() {
        for text in ["train.steps", "steps=3", "=3", ".steps=3", "train.=3"] {
            let error = apply(&mut Table::new(), text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("--set {text}: write it as")), "{error}");
        }
    }
}
