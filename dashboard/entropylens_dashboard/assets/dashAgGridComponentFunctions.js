(function () {
  const cells = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  const make = function () { return window.React.createElement.apply(null, arguments); };
  const stop = event => event.stopPropagation();

  cells.RunName = function (props) {
    const row = props.data;
    const dot = make('span', { className: 'dot', key: 'dot', style: { background: row.colour, marginRight: 8 } });
    if (!row.href) return make('span', { title: row.folder }, dot, props.value);
    return make('a', { href: row.href, title: row.folder, onClick: stop }, dot, props.value);
  };

  cells.Marked = function (props) {
    return make('span', { title: props.data[props.colDef.field + '_title'] }, props.value);
  };

  cells.Verdict = function (props) {
    const mark = { healthy: '✓', watch: '!', failing: '✕', unknown: '?' }[props.value] || '';
    const text = props.value ? mark + ' ' + props.value : '…';
    return make('span', { title: props.data.reason },
      make('span', { className: 'level-' + props.value, key: 'level' }, text), ' ', props.data.reason || '');
  };

  cells.Spark = function (props) {
    const values = props.value;
    if (!values || !values.length) return null;
    const finite = values.filter(v => v !== null);
    if (!finite.length) return make('span', null, 'NaN');
    const low = Math.min.apply(null, finite), high = Math.max.apply(null, finite), wide = high - low || 1;
    const x = i => values.length < 2 ? 50 : 1 + 98 * i / (values.length - 1);
    const y = v => 23 - 20 * (v - low) / wide;
    let path = '', open = false;
    const wild = [];
    values.forEach(function (v, i) {
      if (v === null) { open = false; wild.push('M' + x(i) + ' 2V24'); return; }
      path += (open ? 'L' : 'M') + x(i).toFixed(1) + ' ' + y(v).toFixed(1);
      open = true;
    });
    const title = finite[finite.length - 1] + ' now; from ' + low + ' to ' + high;
    return make('svg', { className: 'spark', viewBox: '0 0 100 26', preserveAspectRatio: 'none', role: 'img', 'aria-label': title },
      make('title', { key: 't' }, title),
      make('path', { d: path, key: 'p', vectorEffect: 'non-scaling-stroke' }),
      make('path', { d: wild.join(''), className: 'wild', key: 'w', vectorEffect: 'non-scaling-stroke' }));
  };
})();
