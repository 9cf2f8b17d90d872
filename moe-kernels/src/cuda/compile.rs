//! From a file of kernels to machine code.

use std::ffi::{CString, c_char};
use std::ptr;

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::cache;
use super::library::Library;
use super::source::{PRELUDE, Variant};
use crate::{Error, Result};

/// What the compiler calls a GPU of a compute capability.
pub(super) fn architecture((major, minor): (i32, i32)) -> String {
    // `wgmma` and `setmaxnreg` are only in the target of the one architecture.
    let exact = if (major, minor) == (9, 0) { "a" } else { "" };
    format!("sm_{major}{minor}{exact}")
}

/// The machine code of a variant: from disk, or compiled and kept there.
pub(super) fn cubin(variant: &Variant, architecture: &str) -> Result<Vec<u8>> {
    Library::Nvrtc.require()?;
    let options = options(variant, architecture);
    let name = format!("{}-{}.cubin", variant.source.name, key(variant, &options, version()?));
    let dir = cache::cache_dir();
    if let Some(kept) = dir.as_ref().and_then(|dir| cache::read(dir, &name)) {
        return Ok(kept);
    }
    let (cubin, _) = compile(variant, architecture, &options)?;
    if let Some(dir) = dir {
        // A cache that cannot be written costs time, and nothing else.
        let _ = cache::write(&dir, &name, &cubin);
    }
    Ok(cubin)
}

fn options(variant: &Variant, architecture: &str) -> Vec<String> {
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".into()];
    options.extend(variant.options());
    options
}

/// Of everything that the machine code depends on; of the compiler, major and minor version.
fn key(variant: &Variant, options: &[String], (major, minor): (i32, i32)) -> String {
    let mut hash = blake3::Hasher::new();
    let compiler = format!("nvrtc {major}.{minor}");
    for part in
        [PRELUDE, variant.source.text, &compiler].into_iter().chain(options.iter().map(String::as_str))
    {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().to_hex()[..32].into()
}

fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; the pointers are valid for writing.
    check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

fn check(call: &'static str, result: nvrtcResult) -> Result<()> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(Error::Driver { call, code: result as i32, reason: format!("{result:?}") })
}

/// A program of the compiler.
struct Program(nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// The machine code, and what the compiler says of it.
fn compile(variant: &Variant, architecture: &str, options: &[String]) -> Result<(Vec<u8>, String)> {
    let c_string = |text: &str| CString::new(text).expect("sources and options hold no zero bytes");
    let (text, name) = (
        c_string(&[PRELUDE, variant.source.text].concat()),
        c_string(&format!("{}.cu", variant.source.name)),
    );
    let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
    let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(ptr::null_mut());
    // SAFETY: the library is there; all strings outlive the calls; buffers have the sizes that the library asks for.
    unsafe {
        check(
            "nvrtcCreateProgram",
            sys::nvrtcCreateProgram(
                &mut program.0,
                text.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            ),
        )?;
        let result = sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr());
        if result != nvrtcResult::NVRTC_SUCCESS {
            let log = log(&program).unwrap_or_else(|_| format!("{result:?}"));
            return Err(Error::Compile {
                kernels: variant.source.name,
                architecture: architecture.into(),
                log,
            });
        }
        let mut bytes = 0;
        check("nvrtcGetCUBINSize", sys::nvrtcGetCUBINSize(program.0, &mut bytes))?;
        let mut cubin = vec![0u8; bytes];
        check("nvrtcGetCUBIN", sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()))?;
        Ok((cubin, log(&program)?))
    }
}

fn log(program: &Program) -> Result<String> {
    let mut bytes = 0;
    // SAFETY: the buffer has the size that the library asks for.
    unsafe {
        check("nvrtcGetProgramLogSize", sys::nvrtcGetProgramLogSize(program.0, &mut bytes))?;
        let mut log = vec![0u8; bytes];
        check("nvrtcGetProgramLog", sys::nvrtcGetProgramLog(program.0, log.as_mut_ptr().cast()))?;
        Ok(String::from_utf8_lossy(&log).trim_end_matches('\0').trim_end().into())
    }
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;
    use crate::DType;
    use crate::cuda::source::{ALL, ROWS, Source};

    #[test]
    fn the_key_is_of_everything_that_the_code_depends_on() {
        let of = |dtype, arch: &str, version| {
            let variant = ROWS.of(dtype);
            key(&variant, &options(&variant, arch), version)
        };
        let one = of(DType::F32, "sm_90a", (13, 0));
        assert_eq!(one, of(DType::F32, "sm_90a", (13, 0)));
        let with = ROWS.of(DType::F32).with("WIDTH", 2);
        static OTHER: Source = Source { name: "rows", text: "// nothing", types: &[DType::F32], ways: &[] };
        let other = OTHER.of(DType::F32);
        for (what, differs) in [
            ("type", of(DType::F64, "sm_90a", (13, 0))),
            ("architecture", of(DType::F32, "sm_80", (13, 0))),
            ("compiler", of(DType::F32, "sm_90a", (13, 1))),
            ("definition", key(&with, &options(&with, "sm_90a"), (13, 0))),
            ("text", key(&other, &options(&other, "sm_90a"), (13, 0))),
        ] {
            assert_ne!(one, differs, "{what}");
        }
    }

    #[test]
    fn architectures_are_named_as_the_compiler_does() {
        assert_eq!(architecture((9, 0)), "sm_90a");
        assert_eq!(architecture((8, 0)), "sm_80");
        assert_eq!(architecture((12, 0)), "sm_120");
    }

    /// The compiler whose spills are [`known_spills`]: that of continuous integration.
    const KNOWN_COMPILER: (i32, i32) = (13, 0);

    /// Bytes that a kernel of a variant may spill, at most.
    fn known_spills(variant: &Variant) -> usize {
        let is_gated = || variant.options().any(|option| matches!(option.as_str(), "-DGLU=1" | "-DGLU=2"));
        match variant.source.name {
            "grouped_hopper" if is_gated() => 72,
            "routing" => 8,
            "rows" => 4,
            _ => 0,
        }
    }

    /// Lines of a log that say that a kernel is right and slow: products of warpgroups that wait for each other, registers that are not
    /// handed over, more spilled than `spills` bytes.
    fn complaints(log: &str, spills: usize) -> Vec<&str> {
        let spilled = |line: &str| -> Option<usize> {
            line.split(", ").find_map(|part| part.strip_suffix(" bytes spill stores"))?.parse().ok()
        };
        let is_complaint = |line: &&str| {
            line.contains("Potential Performance Loss") || spilled(line).is_some_and(|bytes| bytes > spills)
        };
        log.lines().filter(is_complaint).collect()
    }

    /// Every file of kernels, for every type, for Hopper, without complaints; needs the run-time compiler but no GPU.
    #[test]
    fn all_kernels_compile() {
        if let Err(missing) = Library::Nvrtc.require() {
            assert!(std::env::var_os("MOE_REQUIRE_NVRTC").is_none(), "{missing}");
            eprintln!("skipped: {missing}");
            return;
        }
        // Several at once, the largest first.
        let mut sources = ALL.to_vec();
        sources.sort_by_key(|source| std::cmp::Reverse(source.text.len()));
        let mut variants = Vec::new();
        for source in sources {
            let ways: &[&[_]] = if source.ways.is_empty() { &[&[]] } else { source.ways };
            for (&dtype, way) in
                source.types.iter().flat_map(|dtype| ways.iter().map(move |way| (dtype, way)))
            {
                variants.push(way.iter().fold(source.of(dtype), |v, &(name, value)| v.with(name, value)));
            }
        }
        let compiled = |variant: &Variant| {
            let mut options = options(variant, "sm_90a");
            options.push("--ptxas-options=--warn-on-spills".into());
            compile(variant, "sm_90a", &options)
        };
        let spills_are_known = version().unwrap() == KNOWN_COMPILER;
        variants.par_iter().with_max_len(1).for_each(|variant| {
            let (cubin, log) = compiled(variant).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(&cubin[..4], b"\x7fELF", "{variant:?}");
            let spills = if spills_are_known { known_spills(variant) } else { usize::MAX };
            let complaints = complaints(&log, spills);
            let (file, definitions): (_, Vec<_>) = (variant.source.name, variant.options().collect());
            assert!(complaints.is_empty(), "{file} {definitions:?}: {complaints:#?}");
        });

        macro_rules! source {
            ($text:literal) => {{
                static SOURCE: Source =
                    Source { name: "wrong", text: $text, types: &[DType::F32], ways: &[] };
                SOURCE.of(DType::F32)
            }};
        }
        let error = compiled(&source!("__global__ void k() { undeclared(); }")).unwrap_err();
        assert!(error.to_string().contains("undeclared"), "the log is in the error: {error}");

        let unbounded = source!(
            r#"extern "C" __global__ void k() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }"#
        );
        let (_, log) = compiled(&unbounded).unwrap();
        assert_eq!(complaints(&log, 0).len(), 1, "registers that are not handed over: {log}");
        let crowded = source!(
            r#"extern "C" __global__ void __launch_bounds__(1024, 2) k(T *x) {
                T own[100];
                #pragma unroll
                for (int i = 0; i < 100; i++) own[i] = x[i * 1024 + threadIdx.x];
                __syncthreads();
                #pragma unroll
                for (int i = 0; i < 100; i++) x[i * 1024 + threadIdx.x] = own[i] * own[(i * 7 + 3) % 100];
            }"#
        );
        let (_, log) = compiled(&crowded).unwrap();
        assert_eq!(complaints(&log, 0).len(), 1, "spilled: {log}");
        assert!(complaints(&log, 1 << 20).is_empty(), "{log}");
    }
}
