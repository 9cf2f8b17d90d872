//! From files of prompts and completions to token files.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::json::json_fault;
use super::prepare::choose;
use super::{DataError, Encoder, Prepared, TokenFileWriter};
use crate::durable::Context;

/// A line of a file of prompts and completions.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    prompt: String,
    completion: String,
}

impl Sample {
    /// A line, if it is a sample whose tokens fit into a sequence.
    fn parse(line: &[u8], encoder: &Encoder, sequence_length: usize) -> Result<Parts, String> {
        // Fields without names would be read as well.
        match line.trim_ascii_start().first() {
            Some(b'{') => {}
            Some(_) => return Err("this is no JSON object".to_owned()),
            None => return Err("an empty line".to_owned()),
        }
        let sample: Sample = serde_json::from_slice(line).map_err(|error| json_fault(&error))?;
        for (name, text) in [("prompt", &sample.prompt), ("completion", &sample.completion)] {
            if text.is_empty() {
                return Err(format!("the {name} is empty"));
            }
        }
        let parts =
            encoder.completion(&sample.prompt, &sample.completion).map_err(|error| error.to_string())?;
        let tokens: usize = parts.iter().map(Vec::len).sum();
        let most = sequence_length + 1;
        match tokens <= most {
            true => Ok(parts),
            false => {
                Err(format!("{tokens} tokens, but a sequence takes at most {most} (sequence_length + 1)"))
            }
        }
    }
}

/// Reads files of one JSON object with the strings `prompt` and `completion` a line, in the order given, and writes two token
/// files: each line is a document, whose completion is learnt. Nothing is put between the two, and after them only
/// the encoder's end token. Lines are held
/// out as documents are by [`prepare`](super::prepare()).
///
/// # Errors
/// A line is anything else or longer than `sequence_length + 1` tokens, named by file and line before anything is written; there
/// is only one; a file cannot be read, or a token file not be written.
pub fn prepare_completions(
    files: &[PathBuf],
    encoder: &Encoder,
    sequence_length: usize,
    held_out: f64,
    seed: u64,
    [train_path, held_out_path]: [&Path; 2],
) -> Result<Prepared, DataError> {
    let mut samples = 0;
    for_each_sample(files, encoder, sequence_length, |_, _| {
        samples += 1;
        Ok(())
    })?;
    let mut is_held_out = choose(samples, held_out, seed).ok_or(DataError::OneSample)?.into_iter();

    let mut train = TokenFileWriter::create(train_path, encoder.vocab_size())?;
    let mut held = TokenFileWriter::create(held_out_path, encoder.vocab_size())?;
    let mut prepared = Prepared::default();
    for_each_sample(files, encoder, sequence_length, |path, [prompt, completion]| {
        let is_held_out = is_held_out.next().ok_or_else(|| DataError::Changed { path: path.to_owned() })?;
        let writer = if is_held_out { &mut held } else { &mut train };
        writer.completion(&prompt, &completion)?;
        prepared.count(is_held_out, prompt.len() + completion.len());
        Ok(())
    })?;
    train.finish()?;
    held.finish()?;
    Ok(prepared)
}

/// A prompt and its completion.
type Parts = [Vec<u32>; 2];

/// Calls `f` with every line, and the file it is in.
fn for_each_sample(
    files: &[PathBuf],
    encoder: &Encoder,
    sequence_length: usize,
    mut f: impl FnMut(&Path, Parts) -> Result<(), DataError>,
) -> Result<(), DataError> {
    for path in files {
        let mut file = BufReader::new(File::open(path).context("open", path)?);
        let (mut bytes, mut line) = (Vec::new(), 0);
        while file.read_until(b'\n', &mut bytes).context("read", path)? > 0 {
            line += 1;
            let parts = Sample::parse(&bytes, encoder, sequence_length).map_err(|what| DataError::Line {
                path: path.clone(),
                line,
                what,
            })?;
            f(path, parts)?;
            bytes.clear();
        }
        if line == 0 {
            return Err(DataError::EmptyText { path: path.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::{TokenFile, Tokenizer, TokenizerKind};
    use super::*;

    fn run(texts: &[&str], sequence_length: usize) -> Result<[TokenFile; 2], String> {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> =
            (0..texts.len()).map(|i| folder.path().join(format!("{i}.jsonl"))).collect();
        for (path, text) in files.iter().zip(texts) {
            fs::write(path, text).unwrap();
        }
        let outputs = ["train", "held"].map(|name| folder.path().join(name));
        let paths = outputs.each_ref().map(PathBuf::as_path);
        let encoder = Encoder::open(&TokenizerKind::Byte, None).unwrap();
        let prepared = prepare_completions(&files, &encoder, sequence_length, 0.4, 3, paths);
        match prepared {
            Ok(_) => Ok(outputs.map(|path| TokenFile::open(&path).unwrap())),
            Err(error) => {
                assert!(outputs.iter().all(|path| !path.exists()), "something was written");
                Err(error.to_string())
            }
        }
    }

    #[test]
    fn lines_are_documents_whose_completion_is_learnt() {
        let texts = [
            "{\"prompt\": \"1\", \"completion\": \"ab\"}\n{\"completion\":\"\\n\",\"prompt\":\"2é\"}\n",
            "{\"prompt\":\"3..\",\"completion\":\"c\"}\r\n{\"prompt\":\"4\",\"completion\":\"d\"}\n{\"prompt\":\"5\",\"completion\":\"e\"}",
        ];
        let files = run(&texts, 4).unwrap();
        assert_eq!(files.each_ref().map(TokenFile::documents), [3, 2]);
        let mut seen = Vec::new();
        for file in &files {
            file.verify().unwrap();
            for i in 0..file.documents() {
                let range = file.document(i).unwrap();
                let (tokens, mask) = (file.tokens(range.clone()).unwrap(), file.mask(range).unwrap());
                let prompt = mask.iter().filter(|&&learnt| !learnt).count();
                assert!(mask.is_sorted());
                let text = |tokens| Tokenizer::Byte.decode(tokens, false).unwrap();
                seen.push((text(&tokens[..prompt]), text(&tokens[prompt..])));
            }
        }
        seen.sort();
        let want = [("1", "ab"), ("2é", "\n"), ("3..", "c"), ("4", "d"), ("5", "e")];
        assert!(seen.iter().map(|(p, c)| (p.as_str(), c.as_str())).eq(want));
    }

    #[test]
    fn what_is_no_sample_is_named_by_file_and_line() {
        let good = "{\"prompt\":\"1\",\"completion\":\"ab\"}\n";
        for (bad, what) in [
            ("\n", "an empty line"),
            ("{\"prompt\":\"1\"}", "missing field `completion` (column 14)"),
            (
                "{\"prompt\":\"1\",\"completion\":7}",
                "invalid type: integer `7`, expected a string (column 28)",
            ),
            (
                "{\"prompt\":\"1\",\"completion\":\"a\",\"id\":3}",
                "unknown field `id`, expected `prompt` or `completion` (column 35)",
            ),
            ("[\"1\", \"ab\"]", "this is no JSON object"),
            ("{\"prompt\":\"\",\"completion\":\"a\"}", "the prompt is empty"),
            ("{\"prompt\":\"1\",\"completion\":\"\"}", "the completion is empty"),
            (
                "{\"prompt\":\"123\",\"completion\":\"456\"}",
                "6 tokens, but a sequence takes at most 5 (sequence_length + 1)",
            ),
        ] {
            let error = run(&[good, &format!("{good}{bad}\n{good}")], 4).unwrap_err();
            assert!(error.ends_with(&format!("1.jsonl:2: {what}")), "{error}");
        }
        assert!(run(&[good, ""], 4).unwrap_err().contains("1.jsonl is empty"));
        assert!(run(&[good], 4).unwrap_err().contains("only one prompt with a completion"));
    }
}
