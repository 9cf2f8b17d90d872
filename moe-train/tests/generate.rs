//! Texts that a model continues: what transformers' greedy search gives, and what passes over all tokens give.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use moe_train::checkpoint::Weights;
use moe_train::data::Tokenizer;
use moe_train::infer::{Generation, InferError, Sampling, context_length, generate, write_text};
use moe_train::run::open_weights;
use moe_train::trace::{Options, Tokens, trace};
use moe_train::{Error, Result};
use serde::Deserialize;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf")
}

fn open(fixture: &str) -> Arc<Weights> {
    Arc::new(open_weights(&fixtures().join(fixture)).unwrap())
}

fn greedy(tokens: usize, stop: &[u32]) -> Generation {
    Generation { tokens, sampling: Sampling::greedy(), stop: stop.to_vec() }
}

fn continued(weights: &Arc<Weights>, prompt: &[u32], generation: &Generation) -> Result<Vec<u32>> {
    let mut tokens = Vec::new();
    generate(weights, prompt, generation, |token| {
        tokens.push(token);
        Ok(())
    })?;
    Ok(tokens)
}

/// The logits after the last of `tokens`, from one pass without a cache.
fn last_logits(weights: &Arc<Weights>, tokens: &[u32]) -> Vec<f64> {
    let ids = tokens.iter().map(|&token| i64::from(token)).collect();
    let tokens = Tokens { batch: 1, length: tokens.len(), ids };
    let traced = trace::<f32>(weights, &tokens, &Options::default()).unwrap();
    let (_, logits) = traced.tensors().find(|(name, _)| *name == "logits").unwrap();
    let logits = logits.values();
    logits[logits.len() - weights.model().vocab_size..].iter().map(|&logit| f64::from(logit)).collect()
}

/// What `make_generate.py` wrote of a fixture.
#[derive(Deserialize)]
struct Golden {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    margin: f64,
}

fn golden() -> std::collections::BTreeMap<String, Golden> {
    serde_json::from_slice(&fs::read(fixtures().join("generate.json")).unwrap()).unwrap()
}

fn sample(arguments: &[&str], input: &[u8]) -> (i32, Vec<u8>, String) {
    use std::io::Write;
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
    command.arg("sample").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // It may have ended before it read anything.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), output.stdout, String::from_utf8(output.stderr).unwrap())
}

/// Through the command; the vocabulary of the fixtures is 67 tokens, which stand for bytes.
#[test]
fn tokens_are_those_of_transformers_greedy_search() {
    let golden = golden();
    assert!(golden.len() >= 10);
    let mut ended = 0;
    for (name, Golden { prompt, mut tokens, margin }) in golden {
        assert!(margin > 1e-4, "{name}: a near tie");
        if tokens.last() == Some(&2) {
            tokens.pop();
            ended += 1;
        }
        let folder = fixtures().join(&name);
        let text = |tokens: &[u32]| tokens.iter().map(|&token| token as u8).collect::<Vec<u8>>();
        let limit = (32 - prompt.len()).to_string();
        let arguments = [
            folder.to_str().unwrap(),
            "--prompt",
            "-",
            "--tokenizer",
            "byte",
            "--temperature",
            "0",
            "--tokens",
            &limit,
        ];
        let (status, out, err) = sample(&arguments, &text(&prompt));
        assert_eq!(status, 0, "{name}: {err}");
        assert_eq!(out, [text(&prompt), text(&tokens), b"\n".to_vec()].concat(), "{name}");
    }
    println!("{ended} of them ended before the limit");
}

/// Beyond the 32 positions of the model it goes on from the last 16.
#[test]
fn a_text_longer_than_the_context_goes_on_from_its_last_half() {
    for fixture in ["mixtral_linear_window", "deepseek_v3", "olmoe"] {
        let weights = open(fixture);
        assert_eq!(context_length(&weights).unwrap(), 32);
        for prompt in [5, 32, 33, 70] {
            let prompt: Vec<u32> = (0..prompt).map(|i| (i * i + 3 * i) % 67).collect();
            let got = continued(&weights, &prompt, &greedy(60, &[])).unwrap();
            let (mut tokens, mut first) = (prompt.clone(), 0);
            for _ in 0..60 {
                if tokens.len() - first > 32 {
                    first = tokens.len() - 16;
                }
                let logits = last_logits(&weights, &tokens[first..]);
                let best = (0..67).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                tokens.push(best as u32);
            }
            assert_eq!(got, tokens[prompt.len()..], "{fixture}, a prompt of {}", prompt.len());
        }
    }
}

#[test]
fn a_text_ends_before_a_stop_token_and_when_nobody_listens() {
    let weights = open("qwen3_moe");
    let all = continued(&weights, &[48, 49], &greedy(25, &[])).unwrap();
    assert_eq!(all.len(), 25);
    let at = all.iter().position(|&token| token == all[12]).unwrap();
    let stopped = continued(&weights, &[48, 49], &greedy(25, &[66, all[12]])).unwrap();
    assert_eq!(stopped, all[..at]);
    assert!(continued(&weights, &[48, 49], &greedy(0, &[])).unwrap().is_empty());

    let mut seen = 0;
    let error = generate(&weights, &[48, 49], &greedy(25, &[]), |_| {
        seen += 1;
        if seen < 4 { Ok(()) } else { Err(Error::Protocol { what: "enough" }) }
    });
    assert_eq!((error.unwrap_err().to_string().as_str(), seen), ("enough", 4));
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let weights = open("olmoe_grouped");
    let text = |seed| {
        let sampling = Sampling { temperature: 1.5, top_k: Some(20), top_p: 0.9, seed };
        let generation = Generation { tokens: 30, sampling, stop: Vec::new() };
        let mut out = Vec::new();
        write_text(&weights, &Tokenizer::Byte, b"0123", &generation, &mut out).unwrap();
        assert!(out.starts_with(b"0123") && out.len() == 34);
        out
    };
    assert_eq!(text(1), text(1));
    assert_ne!(text(1), text(2));
}

#[test]
fn prompts_that_are_not_of_the_model_are_refused() {
    let weights = open("mixtral");
    let refused = |prompt: &[u32]| match continued(&weights, prompt, &greedy(1, &[])).unwrap_err() {
        Error::Infer(error) => error,
        other => panic!("{other}"),
    };
    assert_eq!(refused(&[]), InferError::EmptyPrompt);
    assert_eq!(refused(&[66, 67]), InferError::Vocabulary { token: 67, vocab_size: 67 });

    let folder = fixtures().join("mixtral");
    let folder = folder.to_str().unwrap();
    for (arguments, parts) in [
        (&["--prompt", "01"][..], &["mixtral has no tokenizer", "--tokenizer"][..]),
        (&["--tokenizer", "byte", "--prompt", "abc"], &["token 97 of the prompt", "67"]),
        (&["--tokenizer", "byte", "--prompt", ""], &["the prompt has no tokens"]),
        (&["--tokenizer", "byte", "--prompt", "0", "--top-p", "0"], &["top_p = 0", "at most 1"]),
        (&["--tokenizer", "byte", "--prompt", "0", "--temperature=-1"], &["temperature = -1"]),
        (&["--tokenizer", "byte", "--prompt", "0", "--stop", "</s>"], &["--stop = </s>", "number"]),
    ] {
        let (status, _, err) = sample(&[&[folder], arguments].concat(), b"");
        assert_eq!(status, 2, "{arguments:?}: {err}");
        assert!(parts.iter().all(|part| err.contains(part)), "{arguments:?}: {err}");
    }
}
