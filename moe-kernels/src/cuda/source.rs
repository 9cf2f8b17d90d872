//! The files of kernels, and what one of them is compiled for.

use std::hash::{Hash, Hasher};

use crate::DType;

/// A file of kernels inside this crate.
#[derive(Debug)]
pub(super) struct Source {
    /// The file's name, without extension.
    pub(super) name: &'static str,
    /// Its text, with the headers that it asks for before it, without the prelude.
    pub(super) text: &'static str,
    /// What its `T` may be.
    pub(super) types: &'static [DType],
    /// Further definitions it is compiled with, one list for each way; no list where there are none. What is not listed may still
    /// be asked for ([`Variant::with`]); the list is what continuous integration compiles.
    #[cfg_attr(not(test), expect(dead_code, reason = "read where everything is compiled, in a test"))]
    pub(super) ways: &'static [&'static [(&'static str, i64)]],
}

/// What all kernels begin with.
pub(super) const PRELUDE: &str = include_str!("../../kernels/prelude.cuh");

/// The types that kernels of floats are compiled for.
pub(super) const FLOATS: &[DType] = &[DType::F64, DType::F32, DType::Bf16];

macro_rules! sources {
    ($($name:ident = $file:literal $(after [$($header:literal),+])?, $types:expr, $ways:expr;)*) => {
        $(pub(super) static $name: Source = Source {
            name: $file,
            text: concat!(
                $($(include_str!(concat!("../../kernels/", $header, ".cuh")),)+)?
                include_str!(concat!("../../kernels/", $file, ".cu")),
            ),
            types: $types,
            ways: $ways,
        };)*
        /// All files of kernels.
        #[cfg(test)]
        pub(super) static ALL: &[&Source] = &[$(&$name),*];
    };
}
sources! {
    ACTIVATION = "activation" after ["gate"], FLOATS, &[];
    ATTENTION = "attention", FLOATS, &[];
    ATTENTION_FLASH = "attention_flash" after ["attention_flash", "attention_flash_rows"], &[DType::Bf16], super::attention_flash::WAYS;
    ATTENTION_FLASH_BACKWARD = "attention_flash_backward" after
        ["attention_flash", "attention_flash_queries", "attention_flash_keys"], &[DType::Bf16], super::attention_flash::WAYS;
    BALANCE = "balance", &[DType::F64, DType::F32], &[];
    EMBEDDING = "embedding", FLOATS, &[];
    GEMM = "gemm", FLOATS, &[];
    GROUPED = "grouped", FLOATS, &[];
    GROUPED_HOPPER = "grouped_hopper" after ["hopper", "grouped_tiles", "gate", "grouped_epilogue"], &[DType::Bf16],
        super::grouped_hopper::WAYS;
    LOSS = "loss", FLOATS, super::loss::WAYS;
    NORM = "norm", FLOATS, &[];
    ROPE = "rope", FLOATS, &[];
    ROWS = "rows", &[DType::F64, DType::F32, DType::Bf16, DType::I64, DType::I32, DType::U8], &[];
    ELEMENTWISE = "elementwise", FLOATS, &[];
    REDUCE = "reduce", FLOATS, &[];
    GROUPED_BIAS = "grouped_bias", FLOATS, &[];
    OPTIM = "optim", FLOATS, &[];
    ROUTING = "routing" after ["keys"], &[DType::F64, DType::F32], &[];
    CHOICES = "choices" after ["keys"], &[DType::F64, DType::F32], &[];
}

/// Most definitions of a [`Variant`].
const DEFINITIONS: usize = 7;

/// A file of kernels for one `T`, with definitions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Variant {
    pub(super) source: &'static Source,
    dtype: DType,
    definitions: [(&'static str, i64); DEFINITIONS],
}

/// By the file's name, which is hashed at every launch, rather than by its text.
impl PartialEq for Variant {
    fn eq(&self, other: &Self) -> bool {
        (self.source.name, self.dtype, self.definitions)
            == (other.source.name, other.dtype, other.definitions)
    }
}

impl Eq for Variant {}

impl Hash for Variant {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.source.name, self.dtype).hash(state);
        self.definitions.iter().take_while(|d| !d.0.is_empty()).for_each(|d| d.hash(state));
    }
}

impl Source {
    /// For elements of one type.
    pub(super) fn of(&'static self, dtype: DType) -> Variant {
        debug_assert!(self.types.contains(&dtype), "{} has no kernels for {dtype}", self.name);
        Variant { source: self, dtype, definitions: [("", 0); DEFINITIONS] }
    }
}

impl Variant {
    /// With `-Dname=value` besides.
    pub(super) fn with(mut self, name: &'static str, value: i64) -> Self {
        let free = self.definitions.iter_mut().find(|d| d.0.is_empty());
        *free.expect("a variant has room for its definitions") = (name, value);
        self
    }

    /// The compiler's definitions.
    pub(super) fn options(&self) -> impl Iterator<Item = String> {
        let dtype = format!("-DT_{}", self.dtype.name().to_uppercase());
        let definitions = self.definitions.into_iter().filter(|d| !d.0.is_empty());
        std::iter::once(dtype).chain(definitions.map(|(name, value)| format!("-D{name}={value}")))
    }
}
