//! Perplexity of texts: that of transformers' logits in float64, under any folding.
//!
//! The logits are those of `fixtures/hf/make.py`: three sequences of 13 tokens, each alone in its context. Of a causal model
//! they are the logits of every document that has these sequences, or the first tokens of one, as its windows.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use moe_pipeline::generate::Named;
use moe_train::checkpoint::Weights;
use moe_train::config::{Dispatcher, ParallelConfig};
use moe_train::eval::{Document, Options, Perplexity, Text, perplexity};
use moe_train::run::open_weights;
use safetensors::SafeTensors;

const LENGTH: usize = 13;
const VOCAB: usize = 67;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf").join(name)
}

fn weights(name: &str) -> Arc<Weights> {
    Arc::new(open_weights(&folder(name)).unwrap())
}

/// Tokens `[3 · 13]` and what transformers gives after each of them, `[3 · 13, 67]`.
struct Golden {
    tokens: Vec<u32>,
    logits: Vec<f64>,
}

impl Golden {
    fn of(name: &str) -> Self {
        let bytes = fs::read(folder(name).join("golden.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let words = |name| file.tensor(name).unwrap().data().chunks_exact(8).map(|b| b.try_into().unwrap());
        let tokens: Vec<u32> = words("input_ids").map(|bytes| i64::from_le_bytes(bytes) as u32).collect();
        let logits: Vec<f64> = words("logits").map(f64::from_le_bytes).collect();
        assert_eq!((tokens.len(), logits.len()), (3 * LENGTH, 3 * LENGTH * VOCAB));
        Golden { tokens, logits }
    }

    /// −ln p of `target` after token `at` of all and those before it in its sequence.
    fn nll(&self, at: usize, target: u32) -> f64 {
        let logits = &self.logits[at * VOCAB..(at + 1) * VOCAB];
        logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[target as usize]
    }

    /// Documents of the golden sequences, and the sum of the negative log-likelihood of each in windows of 13 tokens.
    fn documents(&self) -> Vec<(Vec<u32>, f64)> {
        let [a, b, c]: [&[u32]; 3] = self.tokens.chunks(LENGTH).collect::<Vec<_>>().try_into().unwrap();
        let documents = [
            [a, b, c].concat(),
            b[..5].to_vec(),
            [c, &[66]].concat(),
            a[..2].to_vec(),
            [b, a, &c[..1]].concat(),
            c[..1].to_vec(),
            [a, &b[..7]].concat(),
            [c, b, &a[..2]].concat(),
        ];
        let starts =
            [vec![0, 1, 2], vec![1], vec![2], vec![0], vec![1, 0], vec![2], vec![0, 1], vec![2, 1, 0]];
        let with_sum = |(tokens, starts): (Vec<u32>, Vec<usize>)| {
            let nll = (1..tokens.len())
                .map(|i| self.nll(starts[(i - 1) / LENGTH] * LENGTH + (i - 1) % LENGTH, tokens[i]))
                .sum();
            (tokens, nll)
        };
        documents.into_iter().zip(starts).map(with_sum).collect()
    }
}

fn text(name: &str, documents: &[&[u32]]) -> Text {
    let documents = documents.iter().map(|tokens| Document { tokens: tokens.to_vec(), bytes: tokens.len() });
    Text { path: name.into(), documents: documents.collect() }
}

/// One text of all documents, and one of each that has something to predict.
fn texts(documents: &[(Vec<u32>, f64)]) -> Vec<Text> {
    let tokens: Vec<&[u32]> = documents.iter().map(|(tokens, _)| tokens.as_slice()).collect();
    let each = tokens.iter().filter(|tokens| tokens.len() > 1).map(|&tokens| text("one", &[tokens]));
    [text("all", &tokens)].into_iter().chain(each).collect()
}

fn close(got: f64, want: f64, tolerance: f64, what: &str) {
    assert!((got - want).abs() <= tolerance * want.abs(), "{what}: {got} is not {want}");
}

#[test]
fn sums_are_those_of_transformers_logits() {
    for name in [
        "mixtral",
        "mixtral_linear_window",
        "qwen2_moe",
        "qwen2_moe_sparse_step",
        "qwen3_moe",
        "qwen3_moe_tied",
        "olmoe",
        "olmoe_grouped",
        "deepseek_v3",
        "deepseek_v3_yarn",
    ] {
        let (golden, weights) = (Golden::of(name), weights(name));
        let documents = golden.documents();
        let sums: Vec<f64> = documents.iter().map(|&(_, sum)| sum).filter(|&sum| sum > 0.0).collect();
        let texts = texts(&documents);
        let options = Options { parallel: ParallelConfig::default(), sequence_length: LENGTH };
        let [doubles, singles] = [
            perplexity::<f64>(&weights, &texts, &options).unwrap(),
            perplexity::<f32>(&weights, &texts, &options).unwrap(),
        ];
        for (measured, tolerance) in [(&doubles, 1e-9), (&singles, 1e-5)] {
            close(measured[0].nll, sums.iter().sum(), tolerance, name);
            for (one, &sum) in measured[1..].iter().zip(&sums) {
                close(one.nll, sum, tolerance, name);
            }
        }
        let predicted: usize = documents.iter().map(|(tokens, _)| tokens.len() - 1).sum();
        let all = doubles[0];
        assert_eq!((all.tokens, all.documents), (predicted as u64, 8), "{name}");
        let sum: Perplexity = doubles[1..].iter().copied().sum();
        assert_eq!((sum.tokens, sum.documents, sum.bytes), (all.tokens, 7, all.bytes - 1));
    }
}

/// Sequences of 13 positions, which are padded where a folding does not divide them, and of all documents in a row.
#[test]
fn no_number_depends_on_the_folding() {
    let of = |world_size, tp, cp, cp_ulysses, pp, ep, etp| ParallelConfig {
        world_size,
        tp,
        cp,
        cp_ulysses,
        pp,
        ep,
        etp,
        ..ParallelConfig::default()
    };
    let all_gather = |parallel| ParallelConfig { dispatcher: Dispatcher::AllGather, ..parallel };
    let cases = [
        (
            "mixtral",
            vec![
                of(12, 2, 2, 1, 3, 2, 2),
                all_gather(of(6, 6, 1, 1, 1, 3, 1)),
                of(5, 1, 1, 1, 1, 1, 1),
                of(8, 2, 4, 1, 1, 2, 2),
                of(12, 1, 4, 2, 3, 2, 1),
            ],
        ),
        ("qwen3_moe_tied", vec![of(12, 2, 1, 1, 3, 4, 1), of(6, 1, 2, 2, 3, 1, 2), of(4, 4, 1, 1, 1, 2, 2)]),
        (
            "deepseek_v3",
            vec![
                all_gather(of(12, 2, 2, 1, 3, 4, 1)),
                of(8, 1, 4, 2, 1, 4, 2),
                ParallelConfig { layers_per_stage: Some(vec![2, 1]), ..of(4, 1, 1, 1, 2, 2, 1) },
            ],
        ),
        (
            "qwen2_moe_sparse_step",
            vec![
                ParallelConfig { vpp: 2, ..of(8, 1, 2, 1, 2, 2, 1) },
                ParallelConfig { vpp: 2, schedule: Some(Named::ZbV), ..of(4, 1, 1, 1, 2, 2, 1) },
            ],
        ),
    ];
    for (name, foldings) in cases {
        let weights = weights(name);
        let texts = texts(&Golden::of(name).documents());
        for sequence_length in [LENGTH, 3, 1000] {
            let measured = |parallel: &ParallelConfig| {
                let options = Options { parallel: parallel.clone(), sequence_length };
                perplexity::<f64>(&weights, &texts, &options)
                    .unwrap_or_else(|error| panic!("{name}: {error}"))
            };
            let one = measured(&ParallelConfig::default());
            for parallel in &foldings {
                for (one, other) in one.iter().zip(measured(parallel)) {
                    close(other.nll, one.nll, 1e-10, &format!("{name}, {parallel:?}"));
                    assert_eq!(Perplexity { nll: one.nll, ..other }, *one);
                }
            }
        }
    }
}

/// The status of `moe-train eval`, what it printed, and its message.
fn eval(arguments: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_moe-train")).arg("eval").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(!err.contains("panicked"), "{err}");
    (output.status.code().unwrap(), out, err)
}

/// The fixture's tokens are bytes below 67.
#[test]
fn the_command_says_what_was_measured() {
    let (golden, root) = (Golden::of("qwen3_moe"), tempfile::tempdir().unwrap());
    let documents: Vec<(Vec<u32>, f64)> = golden.documents();
    let text = |tokens: &[u32]| tokens.iter().map(|&token| token as u8 as char).collect::<String>();
    let [one, all] = ["one.txt", "all.jsonl"].map(|name| root.path().join(name));
    fs::write(&one, text(&documents[0].0)).unwrap();
    let lines = documents.iter().map(|(tokens, _)| serde_json::json!({ "id": 1, "body": text(tokens) }));
    fs::write(&all, lines.map(|line| line.to_string() + "\n").collect::<String>()).unwrap();

    let line = |path: &Path, documents: &str, tokens: f64, bytes: f64, nll: f64| {
        let (loss, bits) = (nll / tokens, nll / bytes / 2f64.ln());
        format!(
            "{}: {documents}, {tokens} tokens predicted, loss {loss:.6} nats per token, perplexity {:.4}, {bits:.4} bits per byte",
            path.display(),
            loss.exp()
        )
    };
    let (folder, path) = (folder("qwen3_moe"), |path: &PathBuf| path.to_str().unwrap().to_owned());
    let arguments = [&path(&folder), "--text", &path(&one), "--tokenizer", "byte"];
    let more = [
        "--sequence-length",
        "13",
        "--dtype",
        "f64",
        "--world-size",
        "8",
        "--tp",
        "2",
        "--ep",
        "4",
        "--pp",
        "2",
    ];
    let (status, out, err) = eval(&[&arguments[..], &more].concat());
    assert_eq!((status, err.as_str()), (0, ""));
    let want = line(&one, "1 document", 38.0, 39.0, documents[0].1);
    assert_eq!(out, format!("windows of 13 tokens, in f64\n{want}\n"));

    let (all, one) = (path(&all), path(&one));
    let arguments = [&path(&folder), "--text", &all, &all, "--field", "body", "--tokenizer", "byte"];
    let (status, out, err) = eval(&[&arguments[..], &more].concat());
    assert_eq!((status, err.as_str()), (0, ""));
    let bytes: f64 = documents.iter().map(|(tokens, _)| tokens.len() as f64).sum();
    let nll: f64 = documents.iter().map(|(_, nll)| nll).sum();
    let want = line(all.as_ref(), "8 documents", bytes - 8.0, bytes, nll);
    let sum = line("all".as_ref(), "16 documents", 2.0 * (bytes - 8.0), 2.0 * bytes, 2.0 * nll);
    assert_eq!(out, format!("windows of 13 tokens, in f64\n{want}\n{want}\n{sum}\n"));

    // Its `max_position_embeddings` and the type of its weights.
    let (status, out, err) = eval(&[&path(&folder), "--text", &one, "--tokenizer", "byte"]);
    assert_eq!(status, 0, "{err}");
    assert!(out.starts_with("windows of 32 tokens, in f32\n"), "{out}");
}

/// Words that stand for the fixture's tokens, after one that begins a text.
#[cfg(feature = "tokenizers")]
#[test]
fn a_folder_of_the_hub_has_its_own_tokenizer() {
    let root = tempfile::tempdir().unwrap();
    let path = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(folder("mixtral").join(name), path(name)).unwrap();
    }
    let vocab: serde_json::Map<String, serde_json::Value> =
        (0..VOCAB).map(|i| (format!("t{i}"), i.into())).collect();
    let tokenizer = |vocab: &serde_json::Map<String, serde_json::Value>| {
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": { "type": "WhitespaceSplit" }, "decoder": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "t9", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
                "special_tokens": { "t9": { "id": "t9", "ids": [9], "tokens": ["t9"] } },
            },
            "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "t66" },
        })
        .to_string()
    };
    fs::write(path("tokenizer.json"), tokenizer(&vocab)).unwrap();
    let golden = Golden::of("mixtral");
    // The first document of the golden sequences that starts as the template has it.
    let words = |tokens: &[u32]| tokens.iter().map(|token| format!("t{token}")).collect::<Vec<_>>().join(" ");
    fs::write(path("text"), words(&golden.tokens[..5])).unwrap();
    let (status, out, err) =
        eval(&[root.path().to_str().unwrap(), "--text", &path("text"), "--dtype", "f64"]);
    assert_eq!(status, 0, "{err}");
    let tokens: Vec<u32> = [9].into_iter().chain(golden.tokens[..5].iter().copied()).collect();
    let options = Options { parallel: ParallelConfig::default(), sequence_length: 32 };
    let want = perplexity::<f64>(&weights("mixtral"), &[text("x", &[&tokens])], &options).unwrap()[0];
    assert_eq!(want.tokens, 5);
    let want = format!("5 tokens predicted, loss {:.6} nats", want.loss());
    assert!(out.contains(&want), "{out} has not {want}");

    fs::write(path("text"), b"t1 t2 \xFF t3").unwrap();
    let (status, _, err) = eval(&[root.path().to_str().unwrap(), "--text", &path("text")]);
    assert_eq!((status, err.contains("text: no UTF-8 at byte 6")), (3, true), "{err}");
}

#[test]
fn what_cannot_be_evaluated_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &[u8]| {
        let path = root.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let [good, letters, empty, single, lines] = [
        file("good", b"0123"),
        file("letters", b"01ab"),
        file("empty", b""),
        file("single", b"1"),
        file("lines", b"{\"text\": \"01\"}\n{\"text\": \"0\xFF\"}\n"),
    ];
    let folder = folder("mixtral");
    for (arguments, status, parts) in [
        (&["--text", &good][..], 2, &["mixtral has no tokenizer", "--tokenizer"][..]),
        (&[], 2, &["--text is needed", "mixtral"]),
        (&["--text", &empty, "--tokenizer", "byte"], 3, &["empty has no text"]),
        (&["--text", &empty, "--field", "text", "--tokenizer", "byte"], 3, &["empty has no text"]),
        (&["--text", &good, &single, "--tokenizer", "byte"], 3, &["single has no document of two tokens"]),
        (&["--text", &good, &letters, "--tokenizer", "byte"], 3, &["letters: document 0", "token 97", "67"]),
        (&["--text", &lines, "--field", "text", "--tokenizer", "byte"], 3, &["lines:2: no UTF-8 at byte 11"]),
        (&["--text", &good, "--field", "text", "--tokenizer", "byte"], 3, &["good:1: "]),
        (&["--text", "gone", "--tokenizer", "byte"], 3, &["gone"]),
        (&["--text", &good, "--tokenizer", "byte", "--sequence-length", "0"], 2, &["sequence_length = 0"]),
        (
            &["--text", &good, "--tokenizer", "byte", "--world-size", "4", "--ep", "4"],
            2,
            &["num_experts must be a multiple of ep"],
        ),
        (&["--text", &good, "--tokenizer", "byte", "--tp", "2"], 2, &["world_size"]),
        (&["--text", &good, "--batches", "3"], 2, &["--batches"]),
        (&["--dtype", "f64"], 2, &["--text"]),
    ] {
        let (got, out, err) = eval(&[&[folder.to_str().unwrap()], arguments].concat());
        assert_eq!((got, out.as_str()), (status, ""), "{arguments:?}: {err}");
        assert!(parts.iter().all(|part| err.contains(part)), "{arguments:?}: {err}");
    }
}
