// The sign-in page: takes over the theme, and keeps the address that was asked for across the sign-in. The browser
// carries the fragment of a form's action over the redirect that answers it, so no parameter has to name a target.
import './theme.js';

document.querySelector('form').action = '/login' + location.hash;
