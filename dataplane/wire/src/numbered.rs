// SPDX-License-Identifier: Apache-2.0

//! Enumerations whose variants have numbers on the wire.

/// Defines one, and what its numbers mean; `$unknown` makes the error of a number that means nothing.
macro_rules! numbered {
    ($(#[$about:meta])* $name:ident: $number:ty, $unknown:expr, {
        $($(#[$meaning:meta])* $variant:ident = $value:literal,)+
    }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($number)]
        pub enum $name {
            $($(#[$meaning])* $variant = $value,)+
        }

        impl TryFrom<$number> for $name {
            type Error = Malformed;

            fn try_from(number: $number) -> Result<Self, Malformed> {
                match number {
                    $($value => Ok($name::$variant),)+
                    _ => Err($unknown(number)),
                }
            }
        }
    };
}

pub(crate) use numbered;
