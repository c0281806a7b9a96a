"""Every identity the package rests on, against dense Jacobians, closed forms and quadrature."""
