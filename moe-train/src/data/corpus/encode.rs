//! Parts are encoded.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use super::super::{DataError, TokenFileWriter};
use super::input::Input;
use super::parts::{Part, Parts};
use super::plan::Plan;
use super::progress::{Counters, Progress, Stage};
use super::{Corpus, PreparedCorpus, source};

/// How often somebody is told how far it is.
const TICK: Duration = Duration::from_millis(500);

/// What threads share that encode.
pub(super) struct Encoding<'a> {
    pub corpus: &'a Corpus,
    inputs: &'a [Input],
    pub plan: &'a Plan,
    pub parts: &'a Parts,
    counters: Counters,
    /// The part that is taken next.
    next: AtomicUsize,
    /// Whether to leave even the part that is being encoded.
    stopped: AtomicBool,
}

impl<'a> Encoding<'a> {
    pub fn new(corpus: &'a Corpus, inputs: &'a [Input], plan: &'a Plan, parts: &'a Parts) -> Self {
        Encoding {
            corpus,
            inputs,
            plan,
            parts,
            counters: Counters::default(),
            next: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    /// Makes all parts that are not there.
    pub fn run(&self, watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>) -> Result<(), DataError> {
        let (sender, receiver) = channel();
        let (mut done, mut first) = (0, None::<(usize, DataError)>);
        thread::scope(|scope| {
            for _ in 0..self.corpus.threads.clamp(1, self.plan.len().max(1)) {
                let sender = sender.clone();
                scope.spawn(move || self.work(&sender));
            }
            drop(sender);
            loop {
                match receiver.recv_timeout(TICK) {
                    Ok((_, Ok(()))) => done += 1,
                    // Parts before this one are complete or being encoded: which error is the first depends on no clock.
                    Ok((part, Err(error))) => {
                        self.next.store(self.plan.len(), Ordering::Relaxed);
                        if first.as_ref().is_none_or(|&(before, _)| part < before) {
                            first = Some((part, error));
                        }
                        continue;
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => break,
                }
                if watch(&self.progress(Stage::Encode, done)).is_break() {
                    self.stopped.store(true, Ordering::Relaxed);
                }
            }
        });
        match first {
            Some((_, error)) => Err(error),
            None if done < self.plan.len() => Err(DataError::Interrupted { done, of: self.plan.len() }),
            None => Ok(()),
        }
    }

    /// How far it is with `parts` complete parts.
    pub fn progress(&self, stage: Stage, parts: usize) -> Progress {
        let counters = &self.counters;
        Progress {
            stage,
            parts,
            all_parts: self.plan.len(),
            documents: Counters::get(&counters.documents),
            tokens: Counters::get(&counters.tokens),
            bytes: Counters::get(&counters.bytes),
            kept_bytes: Counters::get(&counters.kept_bytes),
            all_bytes: self.plan.bytes,
        }
    }

    /// What was made, when all parts are there.
    pub fn prepared(&self) -> PreparedCorpus {
        let counters = &self.counters;
        let empty_documents = Counters::get(&counters.empty_documents);
        PreparedCorpus {
            documents: Counters::get(&counters.documents) - empty_documents,
            empty_documents,
            tokens: Counters::get(&counters.tokens),
            parts: self.plan.len(),
            kept_parts: Counters::get(&counters.kept_parts) as usize,
            damaged_parts: Counters::get(&counters.damaged_parts) as usize,
        }
    }

    /// Takes part after part, and says which is complete.
    fn work(&self, done: &Sender<(usize, Result<(), DataError>)>) {
        loop {
            let part = self.next.fetch_add(1, Ordering::Relaxed);
            if part >= self.plan.len() {
                return;
            }
            let result = match self.part(part) {
                Ok(true) => Ok(()),
                Ok(false) => return,
                Err(error) => Err(error),
            };
            if done.send((part, result)).is_err() {
                return;
            }
        }
    }

    /// Encodes a part that is not there; false if it was left.
    fn part(&self, i: usize) -> Result<bool, DataError> {
        let counters = &self.counters;
        match self.parts.find(i)? {
            Part::Whole(file) => {
                for document in 0..file.documents() {
                    self.count(file.document(document)?.count());
                }
                let bytes = self.plan.part(i).iter().map(|segment| segment.bytes).sum();
                Counters::add(&counters.bytes, bytes);
                Counters::add(&counters.kept_bytes, bytes);
                Counters::add(&counters.kept_parts, 1);
                return Ok(true);
            }
            Part::Damaged => Counters::add(&counters.damaged_parts, 1),
            Part::Absent => {}
        }
        let Corpus { encoder, field, .. } = self.corpus;
        let mut writer = TokenFileWriter::create(&self.parts.path(i), encoder.vocab_size())?;
        let mut text = Vec::new();
        for segment in self.plan.part(i) {
            let mut documents = source::open(&self.inputs[segment.input], segment, field)?;
            while let Some(bytes) = documents.next(&mut text)? {
                if self.stopped.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                let tokens = match text.is_empty() {
                    true => Vec::new(),
                    false => encoder.document(&text).map_err(|error| documents.refuse(error))?,
                };
                writer.document(&tokens)?;
                self.count(tokens.len());
                Counters::add(&counters.bytes, bytes);
            }
        }
        writer.finish()?;
        Ok(true)
    }

    /// Counts a document.
    fn count(&self, tokens: usize) {
        let counters = &self.counters;
        Counters::add(&counters.documents, 1);
        Counters::add(&counters.tokens, tokens as u64);
        Counters::add(&counters.empty_documents, u64::from(tokens == 0));
    }
}
