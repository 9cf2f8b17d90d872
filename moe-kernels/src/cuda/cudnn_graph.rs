//! A graph of operations on tensors of four dimensions, as cuDNN takes it.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Name, cudnnBackendDescriptorType_t as Kind, cudnnDataType_t, cudnnHandle_t,
};
pub(super) use cudarc::cudnn::sys::{cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction};

use super::cudnn::{Description, Part, Plan};
use crate::Result;

/// What a tensor's elements are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Elements {
    Bf16,
    F32,
    I32,
    Bool,
}

impl Elements {
    fn data_type(self) -> cudnnDataType_t {
        match self {
            Elements::Bf16 => cudnnDataType_t::CUDNN_DATA_BFLOAT16,
            Elements::F32 => cudnnDataType_t::CUDNN_DATA_FLOAT,
            Elements::I32 => cudnnDataType_t::CUDNN_DATA_INT32,
            Elements::Bool => cudnnDataType_t::CUDNN_DATA_BOOLEAN,
        }
    }

    /// What elements like these are computed in.
    fn computed_in(self) -> cudnnDataType_t {
        match self {
            Elements::Bf16 => cudnnDataType_t::CUDNN_DATA_FLOAT,
            other => other.data_type(),
        }
    }
}

/// Sizes and strides, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) sizes: [i64; 4],
    pub(super) strides: [i64; 4],
}

impl Shape {
    /// Rows one after the other.
    pub(super) fn packed(sizes: [i64; 4]) -> Self {
        let [_, b, c, d] = sizes;
        Shape { sizes, strides: [b * c * d, c * d, d, 1] }
    }

    /// The last two dimensions in the other order.
    pub(super) fn transposed(self) -> Self {
        let swap = |[a, b, c, d]: [i64; 4]| [a, b, d, c];
        Shape { sizes: swap(self.sizes), strides: swap(self.strides) }
    }
}

/// A tensor of a graph.
#[derive(Clone, Copy)]
pub(super) struct Node {
    part: Part,
    pub(super) shape: Shape,
    elements: Elements,
}

/// Operations, in the order in which they were added.
#[derive(Default)]
pub(super) struct Graph {
    parts: Vec<Description>,
    operations: Vec<Part>,
}

/// The first number of tensors that are no operands.
const BETWEEN: i64 = 1000;

impl Graph {
    /// A matrix of the caller's at a multiple of so many bytes. Its number is below 1000.
    pub(super) fn operand(&mut self, id: i64, elements: Elements, shape: Shape, bytes: i64) -> Result<Node> {
        self.tensor(id, elements, shape, bytes, None)
    }

    /// A number that is passed by value, with its own number below 1000.
    pub(super) fn scalar(&mut self, id: i64, elements: Elements) -> Result<Node> {
        let shape = Shape::packed([1; 4]);
        self.tensor(id, elements, shape, 16, Some(Name::CUDNN_ATTR_TENSOR_IS_BY_VALUE))
    }

    /// What lies between operations: the result of one, and in nobody's memory.
    pub(super) fn between(&mut self, elements: Elements, shape: Shape) -> Result<Node> {
        let id = BETWEEN + self.parts.len() as i64;
        self.tensor(id, elements, shape, 16, Some(Name::CUDNN_ATTR_TENSOR_IS_VIRTUAL))
    }

    fn tensor(
        &mut self,
        id: i64,
        elements: Elements,
        shape: Shape,
        bytes: i64,
        place: Option<Name>,
    ) -> Result<Node> {
        let mut tensor = Description::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_TENSOR_DATA_TYPE, &[elements.data_type()])?
            .set(Name::CUDNN_ATTR_TENSOR_DIMENSIONS, &shape.sizes)?
            .set(Name::CUDNN_ATTR_TENSOR_STRIDES, &shape.strides)?
            .set(Name::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[id])?
            .set(Name::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[bytes])?;
        if let Some(place) = place {
            tensor = tensor.set(place, &[true])?;
        }
        let part = self.keep(tensor)?;
        Ok(Node { part, shape, elements })
    }

    fn keep(&mut self, description: Description) -> Result<Part> {
        let description = description.finalize()?;
        let part = description.part();
        self.parts.push(description);
        Ok(part)
    }

    fn operation(&mut self, kind: Kind, parts: &[(Name, Part)]) -> Result<()> {
        let mut operation = Description::new(kind)?;
        for &(name, part) in parts {
            operation = operation.set(name, &[part])?;
        }
        let part = self.keep(operation)?;
        self.operations.push(part);
        Ok(())
    }

    /// `y = mode(operands…)`, element by element; `y` is new, and of the first operand's shape.
    pub(super) fn pointwise(&mut self, mode: Pointwise, operands: &[Node], to: Elements) -> Result<Node> {
        let y = self.between(to, operands[0].shape)?;
        self.pointwise_into(mode, operands, None, y)
    }

    /// As [`pointwise`](Self::pointwise), for the given `y`; `axis` is that of an index.
    pub(super) fn pointwise_into(
        &mut self,
        mode: Pointwise,
        operands: &[Node],
        axis: Option<i64>,
        y: Node,
    ) -> Result<Node> {
        let mut what = Description::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_POINTWISE_MODE, &[mode])?
            .set(Name::CUDNN_ATTR_POINTWISE_MATH_PREC, &[y.elements.computed_in()])?;
        if let Some(axis) = axis {
            what = what.set(Name::CUDNN_ATTR_POINTWISE_AXIS, &[axis])?;
        }
        let what = self.keep(what)?;
        let names = [
            Name::CUDNN_ATTR_OPERATION_POINTWISE_XDESC,
            Name::CUDNN_ATTR_OPERATION_POINTWISE_BDESC,
            Name::CUDNN_ATTR_OPERATION_POINTWISE_TDESC,
        ];
        let mut parts = vec![
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, what),
            (Name::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, y.part),
        ];
        parts.extend(names.into_iter().zip(operands.iter().map(|node| node.part)));
        self.operation(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR, &parts)?;
        Ok(y)
    }

    /// Where along `axis` each element of a tensor like `x` lies.
    pub(super) fn index(&mut self, x: Node, axis: i64) -> Result<Node> {
        let y = self.between(Elements::I32, x.shape)?;
        self.pointwise_into(Pointwise::CUDNN_POINTWISE_GEN_INDEX, &[x], Some(axis), y)
    }

    /// `y` over the dimensions in which it is 1, or fewer than `x` is.
    pub(super) fn reduce(&mut self, mode: Reduction, x: Node, y: Node) -> Result<Node> {
        let what = Description::new(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_REDUCTION_OPERATOR, &[mode])?
            .set(Name::CUDNN_ATTR_REDUCTION_COMP_TYPE, &[Elements::F32.data_type()])?;
        let what = self.keep(what)?;
        let parts = [
            (Name::CUDNN_ATTR_OPERATION_REDUCTION_DESC, what),
            (Name::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, x.part),
            (Name::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, y.part),
        ];
        self.operation(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR, &parts)?;
        Ok(y)
    }

    /// `y = a · b` in the last two dimensions, with sums in f32; where `b` has fewer heads than `a`, each is for several.
    pub(super) fn product(&mut self, a: Node, b: Node, y: Node) -> Result<Node> {
        let what = Description::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_MATMUL_COMP_TYPE, &[Elements::F32.data_type()])?;
        let what = self.keep(what)?;
        let parts = [
            (Name::CUDNN_ATTR_OPERATION_MATMUL_DESC, what),
            (Name::CUDNN_ATTR_OPERATION_MATMUL_ADESC, a.part),
            (Name::CUDNN_ATTR_OPERATION_MATMUL_BDESC, b.part),
            (Name::CUDNN_ATTR_OPERATION_MATMUL_CDESC, y.part),
        ];
        self.operation(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR, &parts)?;
        Ok(y)
    }

    /// `x` with the last two dimensions in the other order, as what is computed with products is read: in `bf16`.
    pub(super) fn transpose(&mut self, x: Node) -> Result<Node> {
        let y = self.between(Elements::Bf16, x.shape.transposed())?;
        let parts = [
            (Name::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, x.part),
            (Name::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, y.part),
        ];
        self.operation(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR, &parts)?;
        Ok(y)
    }

    /// How it is computed, with the same bits each time if it `must_repeat`; `None` if no engine of the library does.
    pub(super) fn plan(self, handle: cudnnHandle_t, must_repeat: bool) -> Result<Option<Plan>> {
        let graph = Description::new(Kind::CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR)?
            .set(Name::CUDNN_ATTR_OPERATIONGRAPH_HANDLE, &[handle])?
            .set(Name::CUDNN_ATTR_OPERATIONGRAPH_OPS, &self.operations)?
            .finalize()?;
        Plan::new(handle, graph, self.parts, must_repeat)
    }
}
