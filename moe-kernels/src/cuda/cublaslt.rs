//! cuBLASLt: one algorithm for each problem, asked for once.
//!
//! The library multiplies column-major matrices. A row-major matrix is its own transpose read by columns, so `y = op(a) · op(b)` is asked for
//! as `yᵀ = op(b)ᵀ · op(a)ᵀ`: the operands change places, and each keeps its operation.
//!
//! Which algorithm runs depends on the problem and the library alone. Parts of a sum that several blocks form are kept in the type of
//! the sums and added in a step of their own; adding them in place is not allowed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::sys::{
    self, cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasLtReductionScheme_t, cublasStatus_t,
    cudaDataType,
};

use super::Cuda;
use super::library::Library;
use crate::family::Op;
use crate::{DType, Device, Element, Error, Result, View};

/// Scratch memory that an algorithm may use: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Problems whose algorithms are remembered; then all are forgotten, which costs the time of asking again.
const PLANS: usize = 1 << 12;

/// A matrix of a product as it lies in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operand {
    address: u64,
    shape: [usize; 2],
    stride: usize,
    op: Op,
}

impl Operand {
    pub(super) fn of<E: Element>(view: View<'_, E, Cuda>, op: Op) -> Self {
        let layout = view.layout();
        let address = view.buf().address() + (layout.offset * size_of::<E>()) as u64;
        // A single row's stride may be anything.
        Operand { address, shape: layout.shape(), stride: layout.stride.max(layout.cols), op }
    }

    /// What the address is a multiple of, as far as it matters to the library.
    fn alignment(&self) -> u32 {
        1 << self.address.trailing_zeros().min(8)
    }
}

/// `y = op(a) · op(b)` with sums in `sums`, or `y += …`; `y` is of the type `out`, that of the operands or that of the sums.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem {
    pub(super) dtype: DType,
    pub(super) sums: DType,
    pub(super) out: DType,
    /// `[m, n, k]`, all positive.
    pub(super) size: [usize; 3],
    pub(super) y: Operand,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) add: bool,
}

/// What an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dtype: DType,
    out: DType,
    add: bool,
    size: [usize; 3],
    transposed: [bool; 2],
    strides: [usize; 3],
    alignments: [u32; 3],
}

impl From<&Problem> for Key {
    fn from(p: &Problem) -> Self {
        let operands = [&p.y, &p.a, &p.b];
        Key {
            dtype: p.dtype,
            out: p.out,
            add: p.add,
            size: p.size,
            transposed: [p.a.op == Op::T, p.b.op == Op::T],
            strides: operands.map(|o| o.stride),
            alignments: operands.map(Operand::alignment),
        }
    }
}

/// The library on one device, with the algorithms asked for so far.
pub(super) struct Lt {
    handle: cublasLtHandle_t,
    /// `None` where the library has no algorithm.
    plans: Mutex<HashMap<Key, Option<Arc<Plan>>>>,
}

// SAFETY: the library's handle may be used on any thread; the rest is behind a lock.
unsafe impl Send for Lt {}
// SAFETY: as above.
unsafe impl Sync for Lt {}

impl Lt {
    /// On the device whose context is current.
    pub(super) fn new() -> Result<Self> {
        Library::CublasLt.require()?;
        let mut handle = ptr::null_mut();
        // SAFETY: the library is there; the pointer is valid for writing.
        check("cublasLtCreate", unsafe { sys::cublasLtCreate(&mut handle) })?;
        Ok(Lt { handle, plans: Mutex::default() })
    }

    fn plan(&self, problem: &Problem) -> Result<Option<Arc<Plan>>> {
        let key = Key::from(problem);
        // The map is whole after every statement: a panic elsewhere harms nothing.
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&key) {
            return Ok(plan.clone());
        }
        let plan = Plan::new(self.handle, problem)?.map(Arc::new);
        if plans.len() >= PLANS {
            plans.clear();
        }
        plans.insert(key, plan.clone());
        Ok(plan)
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once.
        unsafe { sys::cublasLtDestroy(self.handle) };
    }
}

/// A problem in the library's terms, and the algorithm for it.
struct Plan {
    product: ProductDesc,
    y: Layout,
    a: Layout,
    b: Layout,
    algorithm: cublasLtMatmulAlgo_t,
    workspace: usize,
}

// SAFETY: descriptions are memory that the library only reads once they are made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    fn new(handle: cublasLtHandle_t, p: &Problem) -> Result<Option<Self>> {
        let (input, sums, output) = (data_type(p.dtype)?, data_type(p.sums)?, data_type(p.out)?);
        let product = ProductDesc::new(p.sums, sums, p.b.op, p.a.op)?;
        let (y, a, b) = (Layout::new(output, &p.y)?, Layout::new(input, &p.a)?, Layout::new(input, &p.b)?);
        let preference = Preference::new(p)?;
        // SAFETY: a result of zeros is a valid one.
        let mut found: cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: all descriptions are alive; there is room for the one result that is asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                product.0,
                b.0,
                a.0,
                y.0,
                y.0,
                preference.0,
                1,
                &mut found,
                &mut count,
            )
        };
        if status == cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED || (count == 0 && is_ok(status)) {
            return Ok(None);
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        if !is_ok(found.state) {
            return Ok(None);
        }
        Ok(Some(Plan { product, y, a, b, algorithm: found.algo, workspace: found.workspaceSize }))
    }
}

impl Cuda {
    /// Puts the product on the stream; false where cuBLASLt has no algorithm for it.
    ///
    /// # Safety
    ///
    /// The shapes fit together, and every operand lies in memory of this device.
    pub(super) unsafe fn multiply(&self, problem: &Problem) -> Result<bool> {
        self.bind()?;
        let lt = self.cublaslt()?;
        let Some(plan) = lt.plan(problem)? else { return Ok(false) };
        // Given back at the end, and used again by whatever comes later on the stream.
        let workspace = self.alloc(plan.workspace)?;
        let (alpha, beta) =
            (Scalar::new(problem.sums, 1.0), Scalar::new(problem.sums, f64::from(u8::from(problem.add))));
        let at = |operand: &Operand| operand.address as *mut c_void;
        let (y, a, b) = (at(&problem.y), at(&problem.a), at(&problem.b));
        // SAFETY: the plan was made for matrices of these shapes, strides and alignments, which lie on this device; scalars are of
        // the type of the sums, and are read before the call returns.
        let status = unsafe {
            sys::cublasLtMatmul(
                lt.handle,
                plan.product.0,
                alpha.pointer(),
                b,
                plan.b.0,
                a,
                plan.a.0,
                beta.pointer(),
                y,
                plan.y.0,
                y,
                plan.y.0,
                &plan.algorithm,
                workspace.address() as *mut c_void,
                plan.workspace,
                self.stream().cast(),
            )
        };
        check("cublasLtMatmul", status)?;
        Ok(true)
    }
}

/// A number of the type of the sums.
enum Scalar {
    Double(f64),
    Single(f32),
}

impl Scalar {
    fn new(dtype: DType, x: f64) -> Self {
        if dtype == DType::F64 { Scalar::Double(x) } else { Scalar::Single(x as f32) }
    }

    fn pointer(&self) -> *const c_void {
        match self {
            Scalar::Double(x) => ptr::from_ref(x).cast(),
            Scalar::Single(x) => ptr::from_ref(x).cast(),
        }
    }
}

fn is_ok(status: cublasStatus_t) -> bool {
    status == cublasStatus_t::CUBLAS_STATUS_SUCCESS
}

fn check(call: &'static str, status: cublasStatus_t) -> Result<()> {
    if is_ok(status) {
        return Ok(());
    }
    Err(Error::Driver { call, code: status as i32, reason: format!("{status:?}") })
}

fn data_type(dtype: DType) -> Result<cudaDataType> {
    match dtype {
        DType::F64 => Ok(cudaDataType::CUDA_R_64F),
        DType::F32 => Ok(cudaDataType::CUDA_R_32F),
        DType::Bf16 => Ok(cudaDataType::CUDA_R_16BF),
        other => Err(Error::Unsupported { what: format!("matrix products of {other}") }),
    }
}

/// What is computed: sums in `sums`, for `f32` in full precision.
struct ProductDesc(cublasLtMatmulDesc_t);

impl ProductDesc {
    /// `first` is what the library calls A.
    fn new(sums: DType, scalars: cudaDataType, first: Op, second: Op) -> Result<Self> {
        let compute = if sums == DType::F64 {
            cublasComputeType_t::CUBLAS_COMPUTE_64F
        } else {
            cublasComputeType_t::CUBLAS_COMPUTE_32F
        };
        let mut desc = ProductDesc(ptr::null_mut());
        // SAFETY: the pointer is valid for writing.
        check("cublasLtMatmulDescCreate", unsafe {
            sys::cublasLtMatmulDescCreate(&mut desc.0, compute, scalars)
        })?;
        for (attribute, op) in [
            (cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, first),
            (cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, second),
        ] {
            // `CUBLAS_OP_N` and `CUBLAS_OP_T`.
            let op = i32::from(op == Op::T);
            // SAFETY: both attributes are of 32 bits.
            check("cublasLtMatmulDescSetAttribute", unsafe {
                sys::cublasLtMatmulDescSetAttribute(
                    desc.0,
                    attribute,
                    (&raw const op).cast(),
                    size_of::<i32>(),
                )
            })?;
        }
        Ok(desc)
    }
}

impl Drop for ProductDesc {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created, and is destroyed once.
            unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
        }
    }
}

/// A row-major matrix as the library reads it: by columns.
struct Layout(cublasLtMatrixLayout_t);

impl Layout {
    fn new(dtype: cudaDataType, operand: &Operand) -> Result<Self> {
        let [rows, cols] = operand.shape;
        let mut layout = Layout(ptr::null_mut());
        // SAFETY: the pointer is valid for writing.
        check("cublasLtMatrixLayoutCreate", unsafe {
            sys::cublasLtMatrixLayoutCreate(
                &mut layout.0,
                dtype,
                cols as u64,
                rows as u64,
                operand.stride as i64,
            )
        })?;
        Ok(layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created, and is destroyed once.
            unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
        }
    }
}

/// What an algorithm must be able to do.
struct Preference(cublasLtMatmulPreference_t);

impl Preference {
    fn new(p: &Problem) -> Result<Self> {
        use cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut preference = Preference(ptr::null_mut());
        // SAFETY: the pointer is valid for writing.
        check("cublasLtMatmulPreferenceCreate", unsafe {
            sys::cublasLtMatmulPreferenceCreate(&mut preference.0)
        })?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the attribute is of so many bytes.
            check("cublasLtMatmulPreferenceSetAttribute", unsafe {
                sys::cublasLtMatmulPreferenceSetAttribute(preference.0, attribute, value, bytes)
            })
        };
        let workspace = WORKSPACE as u64;
        set(
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            (&raw const workspace).cast(),
            size_of::<u64>(),
        )?;
        let scheme = cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(
            Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            (&raw const scheme).cast(),
            size_of::<u32>(),
        )?;
        for (attribute, operand) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &p.b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &p.a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &p.y),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &p.y),
        ] {
            let alignment = operand.alignment();
            set(attribute, (&raw const alignment).cast(), size_of::<u32>())?;
        }
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: it was created, and is destroyed once.
            unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
        }
    }
}
