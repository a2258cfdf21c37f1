(function () {
  const plain = { by: 'step', smooth: 0, scale: 'panel', ratio: 'no' };

  function inAddress(values) {
    const query = new URLSearchParams(window.location.search);
    for (const [name, value] of Object.entries(values)) {
      const text = Array.isArray(value) ? value.join(',') : value;
      if (text === null || text === undefined || text === '' || text === plain[name]) query.delete(name);
      else query.set(name, text);
    }
    const text = query.toString();
    window.history.replaceState(window.history.state, '', window.location.pathname + (text ? '?' + text : ''));
  }

  function place(value) {
    if (typeof value === 'number') return value;
    const moment = Date.parse(String(value).replace(' ', 'T') + 'Z');
    return Number.isNaN(moment) ? Number(value) : moment / 1000;
  }

  function edges(change) {
    if (!change) return undefined;
    if (change['xaxis.autorange']) return null;
    const range = change['xaxis.range'] || [change['xaxis.range[0]'], change['xaxis.range[1]']];
    if (range[0] === undefined || range[1] === undefined) return undefined;
    return [place(range[0]), place(range[1])];
  }

  function triggered() {
    const context = window.dash_clientside.callback_context;
    return context.triggered.length ? context.triggered[0] : null;
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    entropylens: {
      collect: function (values, within, spec) {
        const view = {};
        for (const one of window.dash_clientside.callback_context.inputs_list[0])
          view[one.id.control] = one.value === undefined ? null : one.value;
        inAddress(Object.assign({}, view, {
          within: within ? within.join('~') : null, runs: spec && spec.many ? spec.runs : null }));
        return view;
      },
      zoomed: function (changes, within) {
        const cause = triggered();
        const range = cause ? edges(cause.value) : undefined;
        const still = JSON.stringify(range) === JSON.stringify(within);
        return range === undefined || still ? window.dash_clientside.no_update : range;
      },
      unzoom: function (clicks) {
        return clicks ? null : window.dash_clientside.no_update;
      },
      beat: function (count) {
        return document.hidden ? window.dash_clientside.no_update : count;
      },
      third: function (count, asked, answered) {
        // Not before the last was answered; an answer that never comes is waited for a minute.
        const waits = asked && asked !== answered && count - asked < 30;
        return count % 3 || waits ? window.dash_clientside.no_update : count;
      },
      toCompare: function (clicks, rows, prefix) {
        if (clicks && rows && rows.length) {
          const ids = rows.map(row => row.id).slice(0, 50).join(',');
          window.location.assign(prefix + 'compare?runs=' + encodeURIComponent(ids));
        }
        return window.dash_clientside.no_update;
      },
      tagged: function (change, tags) {
        if (!change || !change.length) return window.dash_clientside.no_update;
        const all = Object.assign({}, tags);
        for (const one of change) if (one.colId === 'tags') all[one.data.id] = one.value || '';
        return all;
      },
      lines: function (rows) {
        return (rows || []).slice(0, 24).map(row => row.id).join('\t');
      },
      png: function (clicks) {
        const cause = triggered();
        if (!cause || !cause.value) return window.dash_clientside.no_update;
        const key = JSON.parse(cause.prop_id.slice(0, cause.prop_id.lastIndexOf('.'))).png;
        const graph = document.getElementById(JSON.stringify({ graph: key })).querySelector('.js-plotly-plot');
        const style = getComputedStyle(document.documentElement);
        const read = name => style.getPropertyValue(name).trim();
        const axis = { gridcolor: read('--grid'), color: read('--ink') };
        const layout = Object.assign({}, graph.layout, {
          paper_bgcolor: read('--card'), plot_bgcolor: read('--card'), font: { color: read('--ink') },
          title: { text: graph.closest('.panel').getAttribute('aria-label'), font: { size: 14 } },
          margin: { l: 70, r: 20, t: 64, b: 50 } });
        layout.xaxis = Object.assign({}, layout.xaxis, axis);
        layout.yaxis = Object.assign({}, layout.yaxis, axis);
        window.Plotly.downloadImage({ data: graph.data, layout: layout },
          { format: 'png', width: 1200, height: 600, scale: 2, filename: key.replace(/[^\w.-]+/g, '_').slice(0, 80) });
        return window.dash_clientside.no_update;
      },
      larger: function (clicks) {
        const cause = triggered();
        if (!cause || !cause.value) return window.dash_clientside.no_update;
        const key = JSON.parse(cause.prop_id.slice(0, cause.prop_id.lastIndexOf('.'))).larger;
        const graph = document.getElementById(JSON.stringify({ graph: key }));
        graph.closest('.panel').classList.toggle('larger');
        window.dispatchEvent(new Event('resize'));
        return window.dash_clientside.no_update;
      },
      print: function (clicks) {
        if (clicks) window.print();
        return window.dash_clientside.no_update;
      }
    }
  });

  try {
    const kept = window.localStorage.getItem('mantine-color-scheme-value');
    const dark = kept === 'dark' || (kept !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches);
    document.documentElement.setAttribute('data-mantine-color-scheme', dark ? 'dark' : 'light');
  } catch (error) { /* storage may be forbidden: the page then follows the system */ }

  document.addEventListener('keydown', function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typed = 'input:not([type=radio]):not([type=checkbox]):not([type=range]), textarea, select';
    if (event.target.matches(typed) || event.target.isContentEditable) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const click = id => { const found = document.getElementById(id); if (found) { event.preventDefault(); found.click(); } };
    const actions = { d: 'theme-toggle', r: 'to-runs', c: 'to-compare', u: 'unzoom', p: 'print', '?': 'help-button' };
    if (actions[event.key]) click(actions[event.key]);
    if (event.key === '/') {
      const field = document.querySelector('#filter, main input');
      if (field) { event.preventDefault(); field.focus(); }
    }
  });
})();
