//! Tables without unknown keys.

use serde::de::{DeserializeOwned, Deserializer, Visitor};
use toml::{Table, Value};

use super::ConfigError;

/// Removes the table `name` from `root` and reads it; a missing one is empty. `sections` are all tables with their keys,
/// to say where a misplaced key belongs.
pub(super) fn take<T: DeserializeOwned>(
    root: &mut Table,
    name: &'static str,
    sections: &[(&'static str, &'static [&'static str])],
) -> Result<T, ConfigError> {
    let table = match root.remove(name) {
        None => Table::new(),
        Some(Value::Table(table)) => table,
        Some(other) => {
            let message = format!("a table was expected, not the {} {other}", other.type_str());
            return Err(ConfigError::Value { table: name, key: None, message });
        }
    };
    let known = field_names::<T>();
    if let Some(key) = table.keys().find(|key| !known.contains(&key.as_str())) {
        return Err(unknown(key, &format!("[{name}]"), known, sections));
    }
    table.clone().try_into().map_err(|error: toml::de::Error| {
        // The key is in the error's text only; the message proper does not have it.
        let text = error.to_string();
        let key = text.lines().find_map(|line| line.strip_prefix("in `")?.strip_suffix('`'));
        ConfigError::Value { table: name, key: key.map(str::to_owned), message: error.message().to_owned() }
    })
}

/// The error for a key that nothing has, with the table where it belongs or the nearest of `known`.
pub(super) fn unknown(
    key: &str,
    place: &str,
    known: &[&'static str],
    sections: &[(&'static str, &'static [&'static str])],
) -> ConfigError {
    let hint = match sections.iter().find(|(_, keys)| keys.contains(&key)) {
        Some((owner, _)) => Some(format!("it belongs in [{owner}]")),
        None => nearest(key, known).map(|name| format!("did you mean \"{name}\"?")),
    };
    ConfigError::UnknownKey { key: key.to_owned(), place: place.to_owned(), hint }
}

/// The most similar name, if any is.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let similar = |name: &&str| strsim::jaro_winkler(key, name);
    known.iter().copied().filter(|name| similar(name) > 0.7).max_by(|a, b| similar(a).total_cmp(&similar(b)))
}

/// The names of a struct's fields, as its derived `Deserialize` lists them.
pub(super) fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    let mut names: &'static [&'static str] = &[];
    // Always an error: the names are all that was wanted.
    let _ = T::deserialize(FieldNames(&mut names));
    names
}

/// A deserializer without data that notes which fields are asked for.
struct FieldNames<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for FieldNames<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        self.deserialize_any(visitor)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
